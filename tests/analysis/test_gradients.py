"""Gradient metrics against direct float64 computation: full Hessians, explicit gradients a sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_tools import proto

from lamina.analysis.gradient_estimates import Running
from lamina.analysis.gradient_operators import quantization_error, weighted_operators
from lamina.analysis.gradient_trace import gradient_trace
from lamina.analysis.gradients import GradientResult, gradient_metrics
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.capture import capture
from lamina.ir.program import Program

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

_W1, _W2, _SAMPLES = (3, 4), (4, 3), 6


def _weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in (("w1", _W1), ("w2", _W2))}


def _classifier(weights: dict[str, np.ndarray], output: str = "logits") -> Program:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
        helper.make_node("Tanh", ["h"], ["t"], "tanh"),
        helper.make_node("MatMul", ["t", "w2"], [output], "second"),
    ]
    return capture(proto(nodes, {"x": ["b", 3]}, {output: ["b", 3]}, weights))


def _data(*, labelled: bool = True, batch_size: int = 2, samples: int = _SAMPLES) -> Dataset:
    rng = np.random.default_rng(1)
    extras = {"labels": rng.integers(0, 3, samples)} if labelled else {}
    return Dataset({"x": rng.standard_normal((samples, 3)).astype(np.float32)}, extras, batch_size)


def _forward(x: Any, w1: Any, w2: Any) -> Any:
    return torch.tanh(x @ w1) @ w2


def _double(weights: dict[str, np.ndarray]) -> tuple[Any, Any]:
    return torch.from_numpy(weights["w1"]).double(), torch.from_numpy(weights["w2"]).double()


def _traces(loss: Any, weights: dict[str, np.ndarray]) -> list[float]:
    blocks = torch.autograd.functional.hessian(loss, _double(weights))
    return [float(blocks[i][i].reshape(12, 12).trace()) for i in range(2)]


def _metrics(program: Program, data: Dataset, **options: Any) -> GradientResult:
    return gradient_metrics(program, data, precision=torch.float64, **options)


def _within(found: Any, exact: float) -> bool:
    return abs(found.mean - exact) <= 4 * found.standard_error


def test_trace_of_cross_entropy_equals_the_full_hessians() -> None:
    weights, data = _weights(), _data(batch_size=_SAMPLES)
    x, labels = torch.from_numpy(data.inputs["x"]).double(), torch.from_numpy(data.extras["labels"])
    exact = _traces(lambda a, b: torch.nn.functional.cross_entropy(_forward(x, a, b), labels), weights)
    result = _metrics(_classifier(weights), data, metrics=("hawq-trace",), draws=3000, curvature="hessian")
    assert (result.loss, result.curvature) == ("cross-entropy", "hessian")
    for found, want in zip(result.operators, exact, strict=True):
        assert found.trace is not None
        assert found.trace.count == 3000
        assert _within(found.trace, want)
        assert found.trace.standard_error < 0.1 * abs(want)


def test_batches_average_to_the_same_trace() -> None:
    weights, data = _weights(), _data(batch_size=4)  # of 4 and 2 samples
    x, labels = torch.from_numpy(data.inputs["x"]).double(), torch.from_numpy(data.extras["labels"])
    exact = _traces(lambda a, b: torch.nn.functional.cross_entropy(_forward(x, a, b), labels), weights)
    options: dict[str, Any] = {"metrics": ("hawq-trace",), "draws": 3000, "curvature": "hessian"}
    result = _metrics(_classifier(weights), data, **options)
    for found, want in zip(result.operators, exact, strict=True):
        assert found.trace is not None
        assert found.trace.count == 2
        assert found.trace.mean == pytest.approx(want, rel=0.1)


def test_hessian_times_vector_is_exact() -> None:
    from lamina.analysis.gradient_loss import choose_loss
    from lamina.analysis.gradient_probes import Differentiable, _hessian_times

    weights, data = _weights(), _data(batch_size=_SAMPLES)
    x, labels = torch.from_numpy(data.inputs["x"]).double(), torch.from_numpy(data.extras["labels"])
    blocks = torch.autograd.functional.hessian(
        lambda a, b: torch.nn.functional.cross_entropy(_forward(x, a, b), labels), _double(weights)
    )
    program = _classifier(weights)
    model = Differentiable(program, ["w1", "w2"], "cpu", torch.float64)
    loss = choose_loss(program, data)
    first = model.gradients(loss.per_sample(model.outputs(data), data).mean(), create_graph=True)
    vectors = {n: torch.randn(w.shape, dtype=torch.float64) for n, w in model.weights.items()}
    products = _hessian_times(model, first, vectors)
    for i, name in enumerate(("w1", "w2")):
        want = sum(
            (blocks[i][j].reshape(12, 12) @ vectors[other].flatten() for j, other in enumerate(("w1", "w2"))),
            torch.zeros(12, dtype=torch.float64),
        )
        torch.testing.assert_close(products[name].flatten(), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("output", ["logits", "hidden"])
def test_without_labels_the_curvature_is_gauss_newtons(output: str, curvature: str) -> None:
    weights, data = _weights(), _data(labelled=False, batch_size=_SAMPLES)
    x = torch.from_numpy(data.inputs["x"]).double()
    jacobians = torch.autograd.functional.jacobian(lambda a, b: _forward(x, a, b), _double(weights))
    chances = torch.softmax(_forward(x, *_double(weights)), -1)
    exact = []
    for jacobian in jacobians:
        j = jacobian.reshape(_SAMPLES, 3, 12)
        middle = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
        middle = middle if output == "logits" else torch.eye(3, dtype=torch.float64).expand(_SAMPLES, 3, 3)
        exact.append(float(torch.einsum("ncp,ncd,ndp->", j, middle, j)) / _SAMPLES)
    options: dict[str, Any] = {"metrics": ("hawq-trace",), "draws": 3000, "curvature": curvature}
    result = _metrics(_classifier(weights, output), data, **options)
    assert result.loss == ("kl" if output == "logits" else "mse")
    for found, want in zip(result.operators, exact, strict=True):
        assert found.trace is not None
        assert _within(found.trace, want)


def test_gauss_newtons_part_does_not_look_at_labels_but_at_what_counts() -> None:
    program, data = _classifier(_weights()), _data()
    few = Dataset(data.inputs, {"labels": np.where(np.arange(_SAMPLES) < 2, -100, data.extras["labels"])}, 2)
    options: dict[str, Any] = {"metrics": ("hawq-trace",), "curvature": "gauss-newton"}
    own = _metrics(program, data, loss="kl", **options)
    labelled = _metrics(program, data, metrics=("hawq-trace",))
    assert labelled.curvature == "gauss-newton"
    ignoring = _metrics(program, few, **options)
    for a, b, c in zip(own.operators, labelled.operators, ignoring.operators, strict=True):
        assert a.trace is not None
        assert b.trace is not None
        assert c.trace is not None
        assert a.trace.mean == pytest.approx(b.trace.mean, rel=1e-12)
        assert 0 < c.trace.mean < b.trace.mean


def test_gauss_newton_of_next_tokens_equals_the_jacobians() -> None:
    program = _language_model()
    tokens, mask = np.array([[1, 2, 3, 4], [4, 3, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    data = Dataset({"tokens": tokens, "attention_mask": mask}, {})
    options: dict[str, Any] = {"metrics": ("hawq-trace",), "curvature": "gauss-newton", "draws": 3000}
    result = _metrics(program, data, **options)
    weights = [program.graph.initializers[n].const_value for n in ("table", "head")]
    pair = tuple(torch.tensor(w.numpy()).double() for w in weights if w is not None)
    exact = np.zeros(2)
    for row, length in ((0, 3), (1, 1)):
        ids = torch.from_numpy(tokens[row, :length])
        jacobians = torch.autograd.functional.jacobian(lambda t, h, i=ids: t[i] @ h, pair)
        chances = torch.softmax(pair[0][ids] @ pair[1], -1)
        middle = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
        for k, jacobian in enumerate(jacobians):
            j = jacobian.reshape(length, 5, -1)
            exact[k] += float(torch.einsum("ncp,ncd,ndp->", j, middle, j)) / length / 2
    for found, want in zip(result.operators, exact, strict=True):
        assert found.trace is not None
        assert _within(found.trace, want)


def test_hawq_is_trace_over_elements_times_quantization_error() -> None:
    weights = _weights()
    result = _metrics(_classifier(weights), _data(), metrics=("hawq-trace",), bits=(8, 3))
    for found, name in zip(result.operators, ("w1", "w2"), strict=True):
        assert found.trace is not None
        w = weights[name].astype(np.float64)
        scale = np.abs(w).max(axis=0) / 3  # three bits: -3 to 3, a scale an output column
        error = np.square(np.round(w / scale) * scale - w).sum()
        assert found.hawq[3].mean == pytest.approx(found.trace.mean / 12 * error, rel=1e-12)
        assert found.hawq[3].standard_error == pytest.approx(found.trace.standard_error / 12 * error)
        assert abs(found.hawq[8].mean) < abs(found.hawq[3].mean) / 100
        assert found.fisher is None


def _sample_gradients(x: Any, labels: Any, weights: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
    gradients: list[list[np.ndarray]] = [[], []]
    for row, label in zip(x, labels, strict=True):
        pair = [w.requires_grad_() for w in _double(weights)]
        torch.log_softmax(_forward(row[None], *pair), -1)[0, label].backward()
        for kept, w in zip(gradients, pair, strict=True):
            kept.append(w.grad.numpy())
    return gradients


def test_fisher_is_the_mean_of_squared_sample_gradients() -> None:
    weights, data = _weights(), _data(batch_size=3)
    x, labels = torch.from_numpy(data.inputs["x"]).double(), data.extras["labels"]
    result = _metrics(_classifier(weights), data, metrics=("fisher-diagonal",))
    for found, gradients in zip(result.operators, _sample_gradients(x, labels, weights), strict=True):
        assert found.fisher is not None
        each = np.square(gradients).mean(axis=(1, 2))
        assert found.fisher.mean == pytest.approx(each.mean(), rel=1e-10)
        assert found.fisher.standard_error == pytest.approx(each.std(ddof=1) / math.sqrt(_SAMPLES), rel=1e-9)
        # not the square of the batch's mean gradient
        assert found.fisher.mean > 1.5 * np.square(np.mean(gradients, axis=0)).mean()


def test_a_fixed_batch_gives_the_same_fisher() -> None:
    from dataclasses import replace

    program, data = _classifier(_weights()), _data()
    free = _metrics(program, data, metrics=("fisher-diagonal",))
    fixed = _metrics(program, replace(data, fixed_batch=3), metrics=("fisher-diagonal",))
    for a, b in zip(free.operators, fixed.operators, strict=True):
        assert a.fisher is not None
        assert b.fisher is not None
        assert a.fisher.mean == pytest.approx(b.fisher.mean, rel=1e-10)


def test_fisher_without_labels_is_the_expectation_over_the_models_own_prediction() -> None:
    weights = _weights()
    data = _data(labelled=False, samples=600)
    x = torch.from_numpy(data.inputs["x"]).double()
    chances = torch.softmax(_forward(x, *_double(weights)), -1).numpy()
    exact = np.zeros(2)
    for label in range(3):
        gradients = _sample_gradients(x, [label] * len(x), weights)
        exact += [(np.square(g).mean(axis=(1, 2)) * chances[:, label]).mean() for g in gradients]
    result = _metrics(_classifier(weights), data, metrics=("fisher-diagonal",), samples=600)
    for found, want in zip(result.operators, exact, strict=True):
        assert found.fisher is not None
        assert _within(found.fisher, want)


def _language_model() -> Program:
    rng = np.random.default_rng(3)
    table = rng.standard_normal((5, 4)).astype(np.float32)
    head = rng.standard_normal((4, 5)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["e"], "embed"),
        helper.make_node("MatMul", ["e", "head"], ["logits"], "head"),
    ]
    model = proto(nodes, {"tokens": ["b", "t"]}, {"logits": ["b", "t", 5]}, {"table": table, "head": head})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "t"])
    model.graph.input.append(mask)
    return capture(model)


def test_next_token_loss_skips_padding() -> None:
    program = _language_model()
    tokens = np.array([[1, 2, 3, 4], [4, 3, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    data = Dataset({"tokens": tokens, "attention_mask": mask}, {})
    result = _metrics(program, data, metrics=("fisher-diagonal",))
    assert result.loss == "next-token"
    assert [o.operator.op_type for o in result.operators] == ["Gather", "MatMul"]
    names = ("table", "head")
    arrays = {n: program.graph.initializers[n].const_value for n in names}
    squares = np.zeros(2)
    for row, length in ((0, 4), (1, 2)):
        table, head = (torch.tensor(arrays[n].numpy()).double().requires_grad_() for n in names)  # type: ignore[union-attr]
        ids = torch.from_numpy(tokens[row])
        torch.nn.functional.cross_entropy((table[ids] @ head)[: length - 1], ids[1:length]).backward()
        squares += [float(table.grad.square().mean()), float(head.grad.square().mean())]
    for found, want in zip(result.operators, squares / 2, strict=True):
        assert found.fisher is not None
        assert found.fisher.mean == pytest.approx(want, rel=1e-10)


def test_gradient_trace_is_the_correlation_of_gradients() -> None:
    weights, other, data = _weights(), _weights(5), _data(batch_size=_SAMPLES)
    found = gradient_trace(_classifier(weights), _classifier(other), data, precision=torch.float64)
    x, labels = torch.from_numpy(data.inputs["x"]).double(), data.extras["labels"]
    pairs = zip(*(_sample_gradients(x, labels, w) for w in (weights, other)), strict=True)
    exact = [np.corrcoef(np.mean(a, axis=0).ravel(), np.mean(b, axis=0).ravel())[0, 1] for a, b in pairs]
    assert [e.mean for e in found.weights.values()] == pytest.approx(exact, rel=1e-10)
    assert found.score == pytest.approx(np.mean(exact))


@pytest.mark.parametrize("labelled", [True, False])
def test_gradient_trace_of_the_base_itself_is_one(labelled: bool) -> None:
    program = _classifier(_weights())
    found = gradient_trace(program, program, _data(labelled=labelled), precision=torch.float64)
    assert found.score == pytest.approx(1.0)
    assert found.unmatched == ()


def test_gradient_trace_has_no_scale() -> None:
    def scaled(factor: float) -> Any:
        return lambda outputs, batch: factor * outputs[0].square().sum(-1)

    base, other, data = _classifier(_weights()), _classifier(_weights(5)), _data(labelled=False)
    one = gradient_trace(base, other, data, loss=scaled(1.0), precision=torch.float64)
    many = gradient_trace(base, other, data, loss=scaled(100.0), precision=torch.float64)
    assert -1 < one.score < 0.999
    assert many.score == pytest.approx(one.score, rel=1e-9)


def test_gradient_trace_leaves_out_weights_of_other_shapes() -> None:
    weights = _weights()
    stacked = {"w1": weights["w1"], "w2": np.concatenate([weights["w2"]] * 2, axis=1)}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "w2"], ["logits"], "second"),
    ]
    wide = capture(proto(nodes, {"x": ["b", 3]}, {"logits": ["b", 6]}, stacked))
    found = gradient_trace(_classifier(weights), wide, _data(), precision=torch.float64)
    assert list(found.weights) == ["w1"]
    assert found.unmatched == ("w2",)


def test_gradient_trace_needs_a_weight_in_common() -> None:
    weights = _weights()
    narrow = {"w1": weights["w1"][:, :2].copy(), "w2": weights["w2"][:2].copy()}
    with pytest.raises(DataError, match="no weight in common"):
        gradient_trace(_classifier(weights), _classifier(narrow), _data())


def test_operators_and_their_channel_axes() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "k": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "kt": rng.standard_normal((4, 2, 3, 3)).astype(np.float32),
        "g": rng.standard_normal((5, 2)).astype(np.float32),
        "m": rng.standard_normal((7, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"], "conv"),
        helper.make_node("ConvTranspose", ["a", "kt"], ["b"], "up"),
        helper.make_node("GlobalAveragePool", ["b"], ["c"], "pool"),
        helper.make_node("Flatten", ["c"], ["d"], "flat"),
        helper.make_node("Gemm", ["d", "g"], ["e"], "gemm", transB=1),
        helper.make_node("Transpose", ["m"], ["mt"], "turn"),
        helper.make_node("MatMul", ["e", "mt"], ["y"], "product"),
    ]
    program = capture(proto(nodes, {"x": ["b", 3, 8, 8]}, {"y": ["b", 7]}, weights))
    found = [(o.name, o.weight, o.channel_axis) for o in weighted_operators(program)]
    assert found == [("conv", "k", 0), ("up", "kt", 1), ("gemm", "g", 0), ("product", "m", None)]
    result = _metrics(program, Dataset({"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)}, {}))
    assert all(o.fisher is not None and o.fisher.mean > 0 for o in result.operators)


def test_a_zero_channel_quantizes_without_error() -> None:
    weight = np.zeros((2, 3), np.float32)
    weight[1] = [1, -1, 0.5]
    assert quantization_error(weight, 0, 2) == 0.25
    assert quantization_error(np.zeros((2, 2), np.float32), None, 8) == 0


def test_running_mean_and_error_are_those_of_all_observations() -> None:
    values = np.random.default_rng(0).standard_normal(100)
    running = Running()
    for value in values:
        running.add(float(value))
    found = running.estimate()
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std(ddof=1) / 10)
    assert math.isnan(Running().estimate().standard_error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("hawk",)}, "gradient metric 'hawk' is unknown"),
        ({"bits": (1,)}, "1 is no bit width"),
        ({"loss": "hinge"}, "loss 'hinge' is unknown"),
        ({"samples": 0}, "0 are wanted"),
        ({"curvature": "square"}, "curvature 'square' is unknown"),
        ({"loss": lambda o, b: o[0].sum(-1), "curvature": "gauss-newton"}, "no Gauss-Newton matrix"),
        ({"loss": "next-token"}, "needs one integer input"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        gradient_metrics(_classifier(_weights()), _data(), **options)


def test_labels_that_do_not_fit_are_named() -> None:
    data = _data()
    with pytest.raises(DataError, match="none of the model's 3 classes"):
        gradient_metrics(_classifier(_weights()), Dataset(data.inputs, {"labels": np.full(_SAMPLES, 3)}))
    with pytest.raises(DataError, match="needs integer labels"):
        gradient_metrics(_classifier(_weights()), _data(labelled=False), loss="cross-entropy")


def test_a_loss_of_ones_own() -> None:
    def absolute(outputs: Any, batch: Dataset) -> Any:
        return outputs[0].square().sum(-1)

    result = _metrics(_classifier(_weights()), _data(labelled=False), loss=absolute)
    assert (result.loss, result.curvature) == ("user", "hessian")
    assert all(o.trace is not None and o.fisher is not None for o in result.operators)


def test_the_program_is_left_alone() -> None:
    program = _classifier(_weights())
    before = program.fingerprint
    gradient_metrics(program, _data())
    fresh = Program(program.model)
    assert fresh.fingerprint == before
