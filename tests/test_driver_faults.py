"""A broken pass or transform is named, undone and reported; what is returned is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny import shorten_timing, tiny_data, tiny_model

import lamina
import lamina.driver
from lamina.analysis.statistics import collect
from lamina.backends.backend import Target
from lamina.backends.measure import Ratio
from lamina.data import synthetic
from lamina.errors import PassError, VerificationError
from lamina.ir.capture import capture
from lamina.passes.fold import fold
from lamina.passes.fold.eliminate_identities import EliminateIdentities
from lamina.passes.pass_ import Site
from lamina.passes.quantize.transform import Quantize
from lamina.planner.apply import apply_moves
from lamina.planner.blame import blame, blame_space, undone
from lamina.planner.forms import Folded
from lamina.planner.plan import Move
from lamina.planner.referee import Referee
from lamina.planner.space import Space, build_space
from lamina.planner.timing import Relative
from lamina.report.terminal import result_tables

EMIT = Quantize.emit


@pytest.fixture(scope="module", autouse=True)
def brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINA_CACHE", str(tmp_path_factory.getbasetemp() / "lamina-cache"))
        shorten_timing(patch)
        patch.setattr(lamina.driver, "pick_forms", unmeasured)
        yield


def unmeasured(program: Any, stopwatch: Any, progress: Any, *, without: Any = ()) -> Folded:
    """Folds without timing forms: these tests are about what breaks."""
    folded, names, records = fold(program, without=without)
    same = {case.name: Ratio(1.0, 1.0, 1.0) for case in stopwatch.workload}
    return Folded(folded, names, Relative(1.0, 1.0, 1.0, same), (), tuple(records))


def optimized(budget: str = "size<=0.6x", **options: Any) -> lamina.Result:
    return lamina.optimize(
        tiny_model(),
        budget,
        data=tiny_data(),
        metric="top1",
        target="ort:cpu?threads=1",
        workload="16",
        transforms=["quantize"],
        seconds=0.3,
        **options,
    )


def faulty_emit(monkeypatch: pytest.MonkeyPatch, site: str, change: Callable[..., Any]) -> None:
    """Let ``change`` stand in for what the transform emits at one site."""

    def emit(self: Quantize, at: Site, option: Any, rewriter: Any, nodes: Any) -> list[ir.Value]:
        values = EMIT(self, at, option, rewriter, nodes)
        return change(values, rewriter, nodes) if at.name == site else values

    monkeypatch.setattr(Quantize, "emit", emit)


def raising(values: list[ir.Value], rewriter: Any, nodes: Any) -> list[ir.Value]:
    raise ZeroDivisionError("scale is zero")


def ill_typed(values: list[ir.Value], rewriter: Any, nodes: Any) -> list[ir.Value]:
    values[0].dtype = ir.DataType.INT8
    return values


def misshapen(values: list[ir.Value], rewriter: Any, nodes: Any) -> list[ir.Value]:
    """Valid by every schema, and wrong: only running it shows."""
    axis = rewriter.constant(np.array([0], np.int64), "axis")
    out = rewriter.op("ReduceSum", [values[0], axis], dtype=ir.DataType.FLOAT)
    return [out]


def infinite(values: list[ir.Value], rewriter: Any, nodes: Any) -> list[ir.Value]:
    zero = rewriter.constant(np.array(0, np.float32), "zero")
    shape = values[0].shape
    return [rewriter.op("Div", [values[0], zero], dtype=ir.DataType.FLOAT, shape=shape)]


FAULTS = [
    ("first", raising, "failed: ZeroDivisionError: scale is zero"),
    ("first", ill_typed, "do not fit"),
    ("first", misshapen, "changed from float32["),
    ("second", infinite, "is not finite on given samples 0"),
]


@pytest.mark.parametrize(("change", "reason"), [FAULTS[0][1:], FAULTS[2][1:]])
def test_a_broken_move_is_left_out_and_named(monkeypatch, capsys, change, reason):
    faulty_emit(monkeypatch, "first", change)
    result = optimized("drop<=50%", minimize="size")
    told = result.evidence["undone"]
    assert {entry["where"] for entry in told} == {"first"}
    assert all(entry["pass"].startswith("quantize ") for entry in told)
    assert all(reason in entry["reason"] for entry in told)
    assert {m["site"] for m in result.evidence["moves"]} == {"second"}
    result_tables(result.evidence, ["out/model.onnx"])
    assert f"left out: {told[0]['pass']} (first)" in " ".join(capsys.readouterr().out.split())
    assert lamina.compare(tiny_model(), result.program, tolerance=1.0, samples=4).failures == ()


@pytest.mark.parametrize(("site", "change", "reason"), FAULTS)
def test_each_kind_of_fault_is_blamed_on_its_move(monkeypatch, site, change, reason):
    space = space_of(tiny_model())
    referee = Referee(space.program, [{"x": tiny_data()["x"][:2]}])
    assert blame_space(space, referee) == []
    faulty_emit(monkeypatch, site, change)
    found = undone(blame_space(space, referee))
    offered = next(c for c in space.choices if c.site.name == site).options
    assert [e["pass"] for e in found] == [f"quantize {o.name}" for o in offered]
    assert all(e["where"] == site and reason in e["reason"] for e in found)
    left = space.without({("quantize", site, o.name) for o in offered})
    assert [c.site.name for c in left.choices] == [n for n in ("first", "second") if n != site]


def test_few_culprits_cost_few_trials():
    tried: list[int] = []

    def fault(moves: Any) -> str | None:
        tried.append(len(moves))
        return "bad" if 37 in moves else None

    assert blame(list(range(64)), fault) == [(37, "bad")]  # type: ignore[arg-type, comparison-overlap]
    assert len(tried) == 1 + 2 * 6


def proven(monkeypatch: pytest.MonkeyPatch, apply: Any) -> tuple[Folded, list[dict[str, str]]]:
    """What the driver makes of a fold whose ``apply`` is wrong."""
    monkeypatch.setattr(EliminateIdentities, "apply", apply)
    monkeypatch.setattr(EliminateIdentities, "wants", ())
    monkeypatch.setattr(EliminateIdentities, "idle", lambda self, model: False)
    program = capture(tiny_model())
    request: Any = SimpleNamespace(program=program, progress=None)
    stopwatch: Any = SimpleNamespace(workload=())
    return lamina.driver.proven_folds(request, stopwatch, Referee(program))


def test_a_fold_that_changes_the_function_is_bisected_and_left_out(monkeypatch):
    """It leaves a valid graph with the same interface: only running it shows."""

    def apply(self: EliminateIdentities, rewriter: Any) -> None:
        for node in list(rewriter.graph):
            if node.op_type == "Relu":
                rewriter.replace_uses(node.outputs[0], rewriter.at(node).op("Neg", [node.inputs[0]]))
                rewriter.remove([node])
                rewriter.record(self.name, node.name, "wrong")

    folded, told = proven(monkeypatch, apply)
    assert [e["pass"] for e in told] == ["eliminate-identities"]
    assert "output 'logits' differs" in told[0]["reason"]
    assert "eliminate_identities" not in folded.names
    assert lamina.compare(tiny_model(), folded.program).equal


def test_a_fold_that_raises_is_undone_and_told(monkeypatch):
    def apply(self: EliminateIdentities, rewriter: Any) -> None:
        raise IndexError("off by one")

    folded, told = proven(monkeypatch, apply)
    assert lamina.compare(tiny_model(), folded.program).equal
    assert [e["pass"] for e in told] == ["eliminate-identities"]
    assert "IndexError: off by one" in told[0]["reason"]


def test_what_breaks_after_it_was_built_is_not_shipped(monkeypatch):
    """The last check is of the program that is about to be returned, whatever was checked before."""
    check, broken = Referee.check, []

    def last(self: Referee, program: Any, name: str, *, exact: bool) -> None:
        check(self, program, name, exact=exact)
        if id(program) in built and not broken:
            broken.append(program)
            raise VerificationError(f"after {name}: broken in the meantime")
        built.add(id(program))

    built: set[int] = set()
    monkeypatch.setattr(Referee, "check", last)
    result = optimized("size<=0.6x")
    assert broken
    assert result.program not in broken
    assert any("broken in the meantime" in e["reason"] for e in result.evidence["undone"])


def space_of(model: Any) -> Space:
    program = capture(model)
    sites = [s for s in Quantize().sites(program) if isinstance(s, Site)]
    wanted = sorted({v for s in sites for v in (*s.inputs, *s.outputs)})
    statistics = collect(program, synthetic(program, 8), ranges=wanted)
    return build_space(program, [Quantize()], statistics, Target.parse("ort:cpu?threads=1"))


def move_of(model: Any, site: str = "second") -> tuple[Any, Move]:
    space = space_of(model)
    choice = next(c for c in space.choices if c.site.name == site)
    return space.program, Move(choice.site, choice.options[0])


def test_applying_a_broken_move_names_it(monkeypatch):
    program, move = move_of(tiny_model())
    faulty_emit(monkeypatch, "second", raising)
    with pytest.raises(PassError, match=r"quantize \S+ at 'second' failed: ZeroDivisionError: scale is zero"):
        apply_moves(program, [move])
    faulty_emit(monkeypatch, "first", ill_typed)
    program, move = move_of(tiny_model(), "first")
    with pytest.raises(VerificationError, match="after quantize: types of"):
        apply_moves(program, [move])


def test_verify_all_runs_the_program_after_every_move(monkeypatch):
    program, move = move_of(tiny_model())

    def wrong(values: list[ir.Value], rewriter: Any, nodes: Any) -> list[ir.Value]:
        wide = rewriter.constant(np.zeros((1, 4, 7), np.float32), "wide")
        return [rewriter.op("Add", [values[0], wide], dtype=ir.DataType.FLOAT)]

    faulty_emit(monkeypatch, "second", wrong)
    apply_moves(program, [move])  # structure alone does not tell
    monkeypatch.setenv("LAMINA_VERIFY", "all")
    with pytest.raises(VerificationError, match=r"after quantize \S+ at 'second': "):
        apply_moves(program, [move])


def test_verify_all_finds_nothing_in_a_sound_run(monkeypatch):
    monkeypatch.setenv("LAMINA_VERIFY", "all")
    assert optimized().evidence["undone"] == []


def test_an_unknown_level_is_refused(monkeypatch):
    program, move = move_of(tiny_model())
    monkeypatch.setenv("LAMINA_VERIFY", "everything")
    with pytest.raises(lamina.LaminaError, match="LAMINA_VERIFY=everything is not understood"):
        apply_moves(program, [move])
