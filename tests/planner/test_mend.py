"""Compensation after a plan, and planning with replaced branches: whole runs on random residual MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from stacked_model import WIDTH, stacked
from tiny import shorten_timing

import lamina
from lamina.passes.drop_branch import DropBranch
from lamina.passes.pass_ import Option, Site
from lamina.passes.replace_branch import ReplaceBranch
from lamina.planner.mend import standing
from lamina.planner.plan import Move, Plan
from lamina.report.terminal import result_tables


@pytest.fixture(scope="module", autouse=True)
def brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINA_CACHE", str(tmp_path_factory.getbasetemp() / "lamina-cache"))
        shorten_timing(patch)
        yield


def _optimize(budget: str, transforms: list[str], **options: Any) -> lamina.Result:
    x = np.random.default_rng(1).normal(size=(240, 6, WIDTH)).astype(np.float32)
    return lamina.optimize(
        stacked(6).model,
        budget,
        data={"x": x},
        transforms=transforms,
        target="ort:cpu?threads=1",
        workload="1x6",
        seed=0,
        **{"seconds": 4, **options},
    )


@pytest.fixture(scope="module")
def dropped() -> lamina.Result:
    return _optimize("size<=0.72x", ["drop"])


def test_a_plan_is_repaired_where_that_lowers_the_damage(dropped: lamina.Result) -> None:
    told = dropped.evidence["compensation"]
    assert told["kept"]
    assert told["after"] < 0.9 * told["before"]
    assert dropped.plan.repairs
    assert dropped.evidence["damage"] < told["before"]


def test_the_terminal_says_what_was_repaired(
    dropped: lamina.Result, capsys: pytest.CaptureFixture[str]
) -> None:
    told = dropped.evidence["compensation"]
    result_tables(dropped.evidence, ["out/model.onnx"])
    text = " ".join(capsys.readouterr().out.split())
    damages = f"{told['before']:+.4f} -> {told['after']:+.4f}"
    assert (
        f"compensation kept: {told['operators']} operators refitted, 0 low-rank paths, "
        f"damage on selection data {damages}" in text
    )
    result_tables({**dropped.evidence, "compensation": None}, ["out/model.onnx"])
    assert "compensation" not in capsys.readouterr().out


def test_the_plan_reproduces_the_repaired_program(dropped: lamina.Result) -> None:
    again = lamina.apply(stacked(6).model, Plan.from_json(dropped.plan.to_json()))
    assert _bytes(again.model) == _bytes(dropped.program.model)


def test_a_replaced_branch_is_planned_priced_and_reproduced() -> None:
    result = _optimize("size<=0.85x", ["direct-matching"])
    assert {m.site.transform for m in result.plan.moves} == {"direct-matching"}
    assert result.evidence["size_ratio"] <= 0.85
    again = lamina.apply(stacked(6).model, Plan.from_json(result.plan.to_json()))
    assert _bytes(again.model) == _bytes(result.program.model)


def test_runs_of_dropped_branches_stand_for_the_last_sum() -> None:
    program = stacked(4)
    transform = DropBranch()
    sites = [s for s in transform.sites(program) if isinstance(s, Site)]
    moves = [Move(s, Option("drop")) for s in sites[1:3]]
    assert standing(moves, program) == {"add0_out": "add2_out", "add1_out": "add2_out"}


def test_what_replaces_a_branch_stands_for_its_sum() -> None:
    program = stacked(3)
    site = next(s for s in ReplaceBranch().sites(program) if isinstance(s, Site))
    renamed = program.clone()
    node = next(n for n in renamed.graph if n.name == "add0")
    node.outputs[0].name = "add0_matched_bias_out"
    assert standing([Move(site, Option("full"))], renamed) == {"add0_matched_bias_out": "add0_out"}
    assert standing([Move(site, Option("bias"))], program) == {"x": "add0_out"}


def test_a_plan_that_misses_the_bound_a_little_is_repaired_into_it(dropped: lamina.Result) -> None:
    told = dropped.evidence["compensation"]
    bound = (told["before"] + told["after"]) / 2 * 1.05
    result = _optimize(f"size<=0.95x, drop<={bound:.4f}", ["drop"], minimize="size", seconds=12)
    assert result.evidence["compensation"]["kept"]
    assert result.evidence["compensation"]["before"] > bound
    assert result.evidence["damage"] <= bound


def _bytes(model: ir.Model) -> bytes:
    proto: Any = ir.to_proto(model)
    return bytes(proto.SerializeToString(deterministic=True))


def test_where_damage_is_minimized_the_least_damaging_after_compensation_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from types import SimpleNamespace

    from lamina.planner import mend as module
    from lamina.planner.builder import Mending

    def finished(name: str, damage: float) -> Any:
        score = SimpleNamespace(damage=damage, error=0.0)
        return SimpleNamespace(candidate=SimpleNamespace(genome=name, score=score))

    after = {"a": (0.04, True), "b": (0.01, True), "c": (0.0, False), "d": (0.0, True)}
    plans = [finished("a", 0.05), finished("b", 0.06), finished("c", 0.07), finished("d", 0.08)]
    builder: Any = SimpleNamespace(mended={}, rounded={})
    parts = []

    def mend(
        request: Any, builder: Any, finalist: Any, goal: Any, *, part: float = 1.0, learning: bool = True
    ) -> Any:
        assert learning == (goal.minimize == "latency")  # of several, only the one that is chosen
        genome = finalist.candidate.genome
        left, kept = after[genome]
        parts.append(part)
        builder.mended[genome] = Mending(1, finalist.candidate.score.damage, left, kept, 1.0, 0)
        return finalist

    monkeypatch.setattr(module, "mend", mend)
    damage: Any = SimpleNamespace(minimize="damage")
    request: Any = SimpleNamespace(seconds=10.0)
    assert module.mend_best(request, builder, plans, damage).candidate.genome == "b"
    assert parts == [pytest.approx(1 / 3), pytest.approx(1 / 2), 1.0]  # d is not looked at
    builder.mended.clear()
    parts.clear()
    hasty: Any = SimpleNamespace(seconds=1.5)  # each takes one
    assert module.mend_best(hasty, builder, plans, damage).candidate.genome == "b"
    assert len(parts) == 2
    latency: Any = SimpleNamespace(minimize="latency")
    assert module.mend_best(None, builder, plans, latency).candidate.genome == "a"  # type: ignore[arg-type]


@pytest.mark.parametrize("better", [True, False])
def test_codes_are_learned_for_the_chosen_plan_and_kept_where_they_are_nearer(
    monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    from types import SimpleNamespace

    from lamina.planner import mend as module
    from lamina.planner.builder import Mending, Rounded

    few = Option("stored-w4", {"weight_bits": 4})
    plan = SimpleNamespace(moves=(SimpleNamespace(option=few),))

    def finished(name: str, label: str = "plain") -> Any:
        score = SimpleNamespace(damage={"a": 0.05, "b": 0.06}[name], error=0.0)
        realized = SimpleNamespace(plan=plan, program=f"{name} {label}")
        return SimpleNamespace(candidate=SimpleNamespace(genome=name, score=score), realized=realized)

    near = {"b descent": 0.02, "b output": 0.01 if better else 0.03}
    outcome = lambda program: SimpleNamespace(divergence=near[program])  # noqa: E731
    builder: Any = SimpleNamespace(
        mended={}, rounded={}, done={}, learning_s=0.0, selection=SimpleNamespace(outcome=outcome)
    )
    asked = []

    def mend(
        request: Any, builder: Any, given: Any, goal: Any, *, part: float = 1.0, learning: bool = True
    ) -> Any:
        name, method = given.candidate.genome, "output" if learning else "descent"
        assert name not in builder.rounded
        assert name not in builder.mended
        asked.append((name, method, given.realized.program))
        builder.rounded[name] = Rounded(1, method, 0.1, 0.05, True, 1.0)
        builder.mended[name] = Mending(1, 0.05, {"a": 0.04, "b": 0.01}[name], True, 1.0)
        builder.done[name] = finished(name, method)
        return builder.done[name]

    monkeypatch.setattr(module, "mend", mend)
    goal: Any = SimpleNamespace(minimize="damage")
    request: Any = SimpleNamespace(seconds=10.0)
    chosen = module.mend_best(request, builder, [finished("a"), finished("b")], goal)
    assert asked == [("a", "descent", "a plain"), ("b", "descent", "b plain"), ("b", "output", "b plain")]
    kept = "output" if better else "descent"
    assert chosen.realized.program == builder.done["b"].realized.program == f"b {kept}"
    assert builder.rounded["b"].method == kept
    assert builder.mended["b"].kept
    builder.rounded.clear()
    builder.mended.clear()
    asked.clear()
    builder.learning_s = 10.0  # no time is left for it: nothing is rounded twice
    module.mend_best(request, builder, [finished("b")], goal)
    assert asked == [("b", "descent", "b plain")]
