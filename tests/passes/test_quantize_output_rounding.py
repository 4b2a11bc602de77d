"""Rounding against the program's outputs: never worse than its start, better where errors are ignored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from quantize_tools import program, relative_error, run
from test_quantize_rounding import FORMS, NETS, chosen, images, mlp, moves, normal, tokens

from lamina.analysis.output_loss import OutputLoss
from lamina.data import Dataset
from lamina.errors import BackendError, PassError
from lamina.passes.quantize import output_rounding, output_search, rounding, straight_through
from lamina.passes.quantize.coded import nearest
from lamina.passes.quantize.rounding import Rounding, round_options
from lamina.passes.quantize.straight_through import learn
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move, Plan
from lamina.planner.realize import reproduce
from lamina.quality.task import CrossEntropy


def deaf(seed):
    """Two layers of which the second hears few directions of the first."""
    few = normal(seed, 48, 3) @ normal(seed + 1, 3, 32)

    def build(r, x):
        y = r.op("MatMul", [x, r.constant(normal(seed + 2, 32, 48), "w0")], name="first")
        return r.op("MatMul", [y, r.constant(few, "w1")], name="second")

    return build


def classifier(r, x):
    y = r.op("Relu", [r.op("MatMul", [x, r.constant(normal(1, 32, 48), "w0")], name="first")])
    y = r.op("MatMul", [y, r.constant(normal(3, 48, 10) / 30, "w1")], name="second")
    return r.op("Softmax", [y], {"axis": -1})


def chain(r, x):
    inputs = [x, r.constant(normal(7, 8, 4, 3, 3) / 4, "w"), r.constant(normal(8, 8), "b")]
    y = r.op("Conv", inputs, name="one")
    y = r.op("MaxPool", [r.op("Relu", [y])], {"kernel_shape": [2, 2], "strides": [2, 2]})
    y = r.op("Conv", [y, r.constant(normal(9, 8, 4, 3, 3) / 4, "v")], {"group": 2}, name="two")
    return r.op("Flatten", [r.op("GlobalAveragePool", [y])], {"axis": 1})


UNSEEN = {
    "classifier": (classifier, tokens, ("b", "t", 32)),
    "chain": (chain, images, ("b", 4, 12, 12)),
}


def divergence(prog, made, x):
    loss, batch = OutputLoss(prog), Dataset({"x0": x}, {}, len(x))
    total, _ = loss.compare({"y": run(made, x)}, {"y": run(prog, x)}, batch)
    return total


def divergences(prog, form, data, x):
    """Of descent and of output."""
    made = (apply_moves(prog, moves(prog, form, data, Rounding(m))) for m in ("descent", "output"))
    return [divergence(prog, m, x) for m in made]


@pytest.mark.parametrize("seed", [10, 20, 30])
def test_what_later_layers_ignore_may_be_wrong(seed):
    prog, x = program(deaf(seed), ("b", "t", 32)), tokens(30, rows=200)
    data, expected = Dataset({"x0": tokens(20, rows=200)}, {}, 16), run(prog, x)
    errors = {}
    for method in ("descent", "output"):
        made = apply_moves(prog, moves(prog, "stored-w3", data, Rounding(method)))
        errors[method] = relative_error(run(made, x), expected)
    assert errors["output"] < 0.92 * errors["descent"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("net", NETS)
def test_calibration_data_is_answered_no_worse_than_by_descent(net, form):
    build, make, shape = NETS[net]
    prog = program(build, shape)
    if not chosen(prog, form) or form == "w8a8-dynamic":
        assert form in ("w4", "w2", "w8a8-dynamic")
        return
    x = make(20)
    data = Dataset({"x0": x}, {}, 4)
    found = divergences(prog, form, data, x)
    assert found[1] <= found[0] * (1 + 1e-3)  # not all of it is held against the start


@pytest.mark.parametrize("net", ["classifier", "chain"])
def test_samples_nobody_saw_are_answered_better(net):
    build, make, shape = UNSEEN[net]
    prog, x = program(build, shape), make(31, rows=128)
    data = Dataset({"x0": make(21, rows=128)}, {}, 16)
    found = divergences(prog, "stored-w2", data, x)
    assert found[1] < 0.95 * found[0]


def test_a_plan_repeats_it_without_data():
    prog, x = program(mlp, ("b", "t", 32)), tokens(30)
    data = Dataset({"x0": tokens(20)}, {}, 4)
    made = moves(prog, "stored-w3", data, Rounding("output"))
    assert all(m.option.parameters["rounding"] == "output" for m in made)
    plan = Plan.from_json(Plan(prog.fingerprint, moves=made).to_json())
    np.testing.assert_array_equal(run(reproduce(prog, plan), x), run(apply_moves(prog, made), x))


def test_without_a_derivative_operators_are_rounded_one_by_one():
    def build(r, x):
        y = r.op("MatMul", [x, r.constant(normal(1, 32, 32), "w0")], name="first")
        return r.op("CumSum", [y, r.constant(np.array(1, np.int64), "axis")])

    prog, data = program(build, ("b", "t", 32)), Dataset({"x0": tokens(20)}, {}, 4)
    found = [moves(prog, "stored-w3", data, Rounding(m))[0].option for m in ("descent", "output")]
    assert found[0] == found[1]
    assert found[1].parameters["rounding"] == "descent"


def test_fused_operators_are_seen_through():
    """What folds write for a transformer has no derivative, but is defined by operators that have one."""

    def build(r, x):
        x = r.op("RMSNormalization", [x, r.constant(np.ones(32, np.float32), "gain")], {"axis": -1})
        qkv = [
            r.op("MatMul", [x, r.constant(normal(i, 32, 32) / 6, f"w{i}")], name=f"m{i}") for i in range(3)
        ]
        heads = {"q_num_heads": 4, "kv_num_heads": 4, "is_causal": 1}
        return r.op(
            "MatMul", [r.op("Attention", qkv, heads), r.constant(normal(5, 32, 32) / 6, "w3")], name="m3"
        )

    prog = program(build, ("b", "t", 32), opset=23)
    x, data = tokens(31, rows=128), Dataset({"x0": tokens(21, rows=128)}, {}, 16)
    made = moves(prog, "stored-w2", data, Rounding("output"))
    assert [m.option.parameters["rounding"] for m in made] == ["output"] * 4
    assert "Attention" in [n.op_type for n in prog.graph]
    plain = moves(prog, "stored-w2", data, Rounding("descent"))
    found = [divergence(prog, apply_moves(prog, m), x) for m in (plain, made)]
    assert found[1] < 0.95 * found[0]


@pytest.mark.parametrize("error", [PassError, BackendError])
def test_what_cannot_be_written_out_is_rounded_one_by_one(monkeypatch, error):
    def refuse(program):
        raise error("no")

    monkeypatch.setattr(output_search, "_plain", refuse)
    prog, data = program(mlp, ("b", "t", 32)), Dataset({"x0": tokens(20)}, {}, 4)
    made = moves(prog, "stored-w3", data, Rounding("output"))
    assert {m.option.parameters["rounding"] for m in made} == {"descent"}


def test_a_shared_weight_moves_as_one():
    def build(r, x):
        w = r.constant(normal(1, 32, 32) / 6, "w")
        y = r.op("Tanh", [r.op("MatMul", [x, w], name="one")])
        return r.op("MatMul", [y, w], name="two")

    prog, data = program(build, ("b", "t", 32)), Dataset({"x0": tokens(20, rows=96)}, {}, 8)
    made = moves(prog, "stored-w2", data, Rounding("output"))
    assert made[0].option.parameters["codes"] == made[1].option.parameters["codes"]
    plain = moves(prog, "stored-w2", data, Rounding("descent"))
    x = tokens(20, rows=96)
    assert divergence(prog, apply_moves(prog, made), x) < divergence(prog, apply_moves(prog, plain), x)


def test_when_time_is_over_codes_are_those_of_the_descent():
    prog, data = program(mlp, ("b", "t", 32)), Dataset({"x0": tokens(20)}, {}, 4)
    picked = chosen(prog, "stored-w3")
    codes = [
        [o.parameters["codes"] for o in round_options(prog, picked, data, Rounding(m, passes=0, rounds=0))]
        for m in ("descent", "output")
    ]
    assert codes[0] == codes[1]


def loss_case(kind, seed):
    values = np.random.default_rng(seed).standard_normal((4, 5, 7))
    if kind == "probabilities":
        values = np.exp(values)
        values /= values.sum(axis=-1, keepdims=True)
    return values


@pytest.mark.parametrize("kind", ["logits", "probabilities", "vectors"])
def test_the_loss_has_the_derivative_and_the_curvature_it_says(kind):
    prog = program(mlp, ("b", "t", 32))
    loss = OutputLoss(prog)
    loss.classes, loss.outputs = kind != "vectors", ["y"]
    batch = Dataset({"x0": np.zeros((4, 5, 32), np.float32)}, {}, 4)
    y0 = loss_case(kind, 1)
    way = np.random.default_rng(2).standard_normal(y0.shape)
    y = y0 + 0.02 * way * y0

    def at(values):
        return loss.compare({"y": values}, {"y": y0}, batch)[0]

    slope = loss.compare({"y": y}, {"y": y0}, batch)[1]["y"]
    if kind == "probabilities":  # the way keeps sums; elsewhere the loss has no meaning
        way = y0 * (way - (way * y0).sum(axis=-1, keepdims=True))
    shown = (at(y + 1e-5 * way) - at(y - 1e-5 * way)) / 2e-5
    assert float((slope * way).sum()) == pytest.approx(shown, rel=1e-3, abs=1e-5)
    generator = np.random.default_rng(3)
    seen = [float((loss.probe({"y": y0}, batch, generator)["y"] * way).sum()) ** 2 for _ in range(4000)]
    bent = (at(y0 + 1e-3 * way) + at(y0 - 1e-3 * way)) / 1e-6
    assert np.mean(seen) == pytest.approx(bent, rel=0.12)
    assert at(y0) == pytest.approx(0, abs=1e-9)


def test_padding_does_not_count():
    prog = program(mlp, ("b", "t", 32))
    loss, mask = OutputLoss(prog), np.array([[1, 1, 0], [1, 0, 0]], np.int64)
    y0, y = normal(1, 2, 3, 32), normal(2, 2, 3, 32)
    batch = Dataset({"x0": normal(3, 2, 3, 32), "attention_mask": mask}, {}, 2)
    other = np.where(mask[:, :, None] == 1, y, normal(4, 2, 3, 32))
    first, slopes = loss.compare({"y": y}, {"y": y0}, batch)
    assert loss.compare({"y": other}, {"y": y0}, batch)[0] == pytest.approx(first, rel=1e-6)
    assert not slopes["y"][mask == 0].any()
    assert loss.positions({"y": y0}, batch) == 3


def learned(**how):
    prog, x = program(classifier, ("b", "t", 32)), tokens(31, rows=128)
    data = Dataset({"x0": tokens(21, rows=128)}, {}, 16)
    made = moves(prog, "stored-w2", data, Rounding("output", **how))
    return divergence(prog, apply_moves(prog, made), x), [m.option.parameters["codes"] for m in made]


@pytest.mark.parametrize("how", [{"rounds": 0}, {"passes": 0}], ids=["passes alone", "rounds alone"])
def test_either_half_of_it_lowers_the_divergence_on_samples_nobody_saw(how):
    none = learned(passes=0, rounds=0)[0]
    assert learned(**how)[0] < 0.97 * none


def test_answers_of_the_original_that_are_not_kept_are_computed_again(monkeypatch):
    kept = learned(passes=3, rounds=2)
    monkeypatch.setattr(output_search, "_KEPT", 0)
    assert learned(passes=3, rounds=2) == kept


def test_a_program_of_a_fixed_batch_learns_from_whole_batches():
    prog = program(mlp, (4, 6, 32))
    data = Dataset({"x0": tokens(20, rows=30)}, {}, 4, fixed_batch=4)
    made = moves(prog, "stored-w2", data, Rounding("output"))
    assert all(m.option.parameters["rounding"] == "output" for m in made)


def test_a_scale_that_is_off_is_found_again():
    """Codes are right, scales 3 % too large: only derivatives by scales can mend that."""
    prog = program(mlp, ("b", "t", 32))
    data = Dataset({"x0": tokens(20, rows=64)}, {}, 16)
    options = [m.option for m in moves(prog, "stored-w8", data, Rounding("nearest"))]
    arrays = {n: v.const_value.numpy() for n, v in prog.graph.initializers.items() if len(v.shape) == 2}
    rounded = []
    for (name, array), option in zip(arrays.items(), options, strict=True):
        right = nearest(array, option.parameters, 1)
        off = replace(right, scale=right.scale * np.float32(1.03))
        moments = np.eye(array.shape[0])[None]
        rounded.append(
            output_search.Rounded(
                off, off.rows(), moments, np.ones(1, np.float32), 1, array.shape, (name,), ()
            )
        )
    search = output_search.OutputSearch(prog, prog, rounded, data)
    made = learn(search, rounded, passes=12, seconds=1e9)
    ratio = [np.abs(m.scale / r.made.scale - 1 / 1.03).mean() for m, r in zip(made, rounded, strict=True)]
    assert max(ratio) < 0.7 * (1 - 1 / 1.03)
    before, after = (search.divergence(c, search.seen) for c in ([r.made for r in rounded], made))
    assert after < 0.5 * before


def test_too_little_time_for_a_few_passes_is_not_begun(monkeypatch):
    monkeypatch.setattr(output_rounding, "learn", lambda *a, **k: pytest.fail("begun"))
    prog, data = program(classifier, ("b", "t", 32)), Dataset({"x0": tokens(21, rows=128)}, {}, 16)
    picked = chosen(prog, "stored-w2")
    codes = [
        [o.parameters["codes"] for o in round_options(prog, picked, data, Rounding(m), learning=1e-4)]
        for m in ("descent", "output")
    ]
    assert codes[0] == codes[1]


def test_a_time_limit_ends_learning_with_codes_no_worse(monkeypatch):
    """The clock runs a tenth of a second a look: the limit is over within three passes of 28 steps."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(straight_through.time, "perf_counter", lambda: next(ticks) / 10)
    prog, x = program(classifier, ("b", "t", 32)), tokens(21, rows=128)
    data = Dataset({"x0": x}, {}, 16)
    picked = chosen(prog, "stored-w2")
    options = round_options(prog, picked, data, Rounding("output"), learning=8.0)
    plain = round_options(prog, picked, data, Rounding("descent"))
    assert [o.parameters["rounding"] for o in options] == ["output"] * 2
    made = [
        apply_moves(prog, [Move(s, o) for (s, _), o in zip(picked, found, strict=True)])
        for found in (plain, options)
    ]
    assert divergence(prog, made[1], x) <= divergence(prog, made[0], x)
    assert next(ticks) < 200
    assert options != plain


def test_a_metrics_own_loss_is_a_twentieth_of_what_is_made_small():
    prog = program(mlp, ("b", "t", 32))
    labels = np.random.default_rng(5).integers(7, size=(4, 5))
    batch = Dataset({"x0": np.zeros((4, 5, 32), np.float32)}, {"labels": labels}, 4)
    own, plain = OutputLoss(prog, CrossEntropy("y")), OutputLoss(prog)
    for loss in (own, plain):
        loss.classes, loss.outputs = True, ["y"]
    y, y0 = loss_case("logits", 1), loss_case("logits", 2)
    both = [loss.compare({"y": y}, {"y": y0}, batch) for loss in (own, plain)]
    alone, slopes = CrossEntropy("y").loss({"y": y}, batch)
    assert both[0][0] - both[1][0] == pytest.approx(0.05 * alone, rel=1e-6)
    np.testing.assert_allclose(both[0][1]["y"] - both[1][1]["y"], 0.05 * slopes["y"], atol=1e-6)


def labelled(seed, labels):
    x = tokens(seed, rows=256)
    return x, Dataset({"x0": x}, {} if labels is None else {"labels": labels(x)}, 16)


def test_of_codes_as_near_to_the_original_those_that_answer_better_are_found():
    """Labels are drawn from a program with other weights: what the original itself gets partly wrong."""
    prog, metric = program(classifier, ("b", "t", 32)), CrossEntropy("y")
    turned = normal(51, 32, 48)

    def labels(x):
        hidden = np.maximum(x @ (normal(1, 32, 48) + 0.3 * turned), 0)
        logits = hidden @ normal(3, 48, 10) / 30
        drawn = (logits + np.random.default_rng(7).gumbel(size=logits.shape)).argmax(axis=-1)
        return np.roll(drawn, 1, axis=1)  # a label belongs to the answer before it

    x, unseen = labelled(61, labels)
    found = {}
    for name, task in (("divergence", None), ("both", metric)):
        options = round_options(
            prog, chosen(prog, "stored-w2"), labelled(60, labels)[1], Rounding("output"), metric=task
        )
        made = apply_moves(
            prog, [Move(s, o) for (s, _), o in zip(chosen(prog, "stored-w2"), options, strict=True)]
        )
        score = metric.score(metric.features({"y": run(made, x)}, unseen))
        found[name] = score, divergence(prog, made, x)
    assert found["both"][0] < found["divergence"][0] - 0.003
    assert found["both"][1] < 1.15 * found["divergence"][1]


def test_data_without_what_the_metric_reads_is_rounded_for_the_divergence_alone():
    prog, data = program(classifier, ("b", "t", 32)), labelled(60, None)[1]
    how, picked = Rounding("output", passes=2, rounds=0), chosen(prog, "stored-w2")
    found = [round_options(prog, picked, data, how, metric=m) for m in (None, CrossEntropy("y"))]
    assert found[0] == found[1]


def test_time_for_more_steps_than_are_of_use_makes_batches_larger_and_steps_smaller(monkeypatch):
    prog = program(classifier, ("b", "t", 32))
    caught = {}

    def catch(search, rounded, **options):
        caught.update(search=search, made=[r.made for r in rounded])
        return caught["made"]

    monkeypatch.setattr(rounding, "round_for_outputs", catch)
    data = Dataset({"x0": tokens(21, rows=256)}, {}, 16)
    round_options(prog, chosen(prog, "stored-w2"), data, Rounding("output"))
    search, made = caught["search"], caught["made"]
    assert len(search.batches) == 128
    answers = search.positions(search.seen[0])
    assert answers == 2 * len(tokens(21)[0])
    small = output_rounding._calm(search, made, 1e-9)
    assert len(search.batches) == 128
    assert small == pytest.approx((answers / 512) ** 0.25)
    assert output_rounding._calm(search, made, float("inf")) == pytest.approx(small / 2)
    assert len(search.batches) == 32
    assert not set(search.held) & set(search.seen)


def test_it_says_how_far_it_is():
    prog, said = program(classifier, ("b", "t", 32)), []
    data = Dataset({"x0": tokens(21, rows=64)}, {}, 16)
    how = Rounding("output", passes=2, rounds=2)
    round_options(prog, chosen(prog, "stored-w2"), data, how, progress=lambda *told: said.append(told))
    assert list(dict.fromkeys(what for _, _, what in said)) == ["operators", "codes", "rounds"]
    assert all(0 <= done <= total for done, total, _ in said)
    codes = [done for done, _, what in said if what == "codes"]
    assert codes == sorted(codes)
    assert codes[-1] == 100
