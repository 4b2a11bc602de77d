"""The backend models that ship with the ``onnx`` package, and what each of them must answer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

SUITES = ("simple", "pytorch-operator", "pytorch-converted", "node")
# How a case is put to lamina. The node tests have fixed shapes, and their weights are inputs, where no fold
# can see them: each also runs with weights as models have them, with every input known, where all of it is
# constant, and with no dimension of what is left as an input known.
VARIANTS = ("as shipped", "weights constant", "all constant", "dynamic dims")


@dataclass(frozen=True)
class Case:
    """One model with the inputs and outputs that ship with it.

    Attributes:
        suite: One of :data:`SUITES`.
        name: Unique in its suite.
        model: The model; never changed.
        data_sets: Per data set, the inputs by name and the expected outputs in order.
        rtol: The suite's own relative tolerance for it.
        atol: Likewise, absolute.
    """

    suite: str
    name: str
    model: onnx.ModelProto
    data_sets: tuple[tuple[dict[str, Any], list[Any]], ...]
    rtol: float
    atol: float

    @property
    def label(self) -> str:
        """Name for messages."""
        return f"{self.suite}/{self.name}"


def cases(*suites: str) -> Iterator[Case]:
    """Every case of the named suites (all, when none is named), in a fixed order."""
    for suite in suites or SUITES:
        yield from _node_cases() if suite == "node" else _stored_cases(suite)


def _node_cases() -> Iterator[Case]:
    for test in sorted(_node_tests(), key=lambda t: t.name):
        names = _fed_names(test.model)
        sets = tuple(
            (_named(names, inputs), [as_array(o) for o in outputs]) for inputs, outputs in test.data_sets
        )
        yield Case("node", test.name, test.model, sets, test.rtol, test.atol)


@cache
def _node_tests() -> tuple[Any, ...]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(load_model_tests(kind="node"))


def _stored_cases(suite: str) -> Iterator[Case]:
    from onnx.backend.test.loader import load_model_tests

    for test in sorted(load_model_tests(kind=suite), key=lambda t: t.name):
        folder = Path(test.model_dir)
        model = onnx.load(folder / "model.onnx")
        sets = tuple(_stored_set(model, data) for data in sorted(folder.glob("test_data_set_*")))
        yield Case(suite, test.name, model, sets, test.rtol, test.atol)


def _stored_set(model: onnx.ModelProto, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    inputs = [
        _stored(folder / f"input_{i}.pb", v)
        for i, v in enumerate(model.graph.input)
        if (folder / f"input_{i}.pb").exists()
    ]
    outputs = [_stored(folder / f"output_{i}.pb", v) for i, v in enumerate(model.graph.output)]
    return _named([v.name for v in model.graph.input], inputs), outputs


def _stored(path: Path, value: onnx.ValueInfoProto) -> Any:
    kind, data = value.type.WhichOneof("value"), path.read_bytes()
    if kind == "sequence_type":
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind == "optional_type":
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def _fed_names(model: onnx.ModelProto) -> list[str]:
    weights = {t.name for t in model.graph.initializer}
    return [v.name for v in model.graph.input if v.name not in weights]


def _named(names: list[str], values: Any) -> dict[str, Any]:
    return {name: as_array(value) for name, value in zip(names, values, strict=False)}


def as_array(value: Any) -> Any:
    """A tensor as numpy has it; sequences and absent values as they are."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if value is None or isinstance(value, (list, tuple, dict)):
        return value
    return np.asarray(value)


def variants(case: Case) -> Iterator[tuple[str, Case]]:
    """The case as shipped, and in the other :data:`VARIANTS` that make sense for it."""
    yield VARIANTS[0], case
    if len(case.data_sets) != 1:
        return
    fed = [v.name for v in case.model.graph.input if v.name in case.data_sets[0][0]]
    tensors = [n for n in fed if _is_tensor(case, n)]
    later = [n for n in tensors if n != fed[0]]
    if later:
        yield VARIANTS[1], _with_constants(case, later)
    if tensors and tensors != later:
        yield VARIANTS[2], _with_constants(case, tensors)
    if len(later) < len(tensors) and case.data_sets[0][0][fed[0]].ndim:
        yield VARIANTS[3], _with_dynamic_dims(_with_constants(case, later))


def _is_tensor(case: Case, name: str) -> bool:
    kinds = {v.name: v.type.WhichOneof("value") for v in case.model.graph.input}
    return kinds[name] == "tensor_type" and isinstance(case.data_sets[0][0][name], np.ndarray)


def _with_constants(case: Case, names: list[str]) -> Case:
    feeds, expected = case.data_sets[0]
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = max(model.ir_version, 4)  # before it an initializer had to be an input as well
    for value in list(model.graph.input):
        if value.name in names:
            model.graph.input.remove(value)
            model.graph.initializer.append(numpy_helper.from_array(feeds[value.name], value.name))
    rest = {n: a for n, a in feeds.items() if n not in names}
    return replace(case, model=model, data_sets=((rest, expected),))


def _with_dynamic_dims(case: Case) -> Case:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.HasField("tensor_type"):
            fed = value.name in case.data_sets[0][0]
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                dim.Clear()
                if fed:
                    dim.dim_param = f"{value.name}_{axis}"
    del model.graph.value_info[:]
    return replace(case, model=model)
