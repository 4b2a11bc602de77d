"""Read off ONNX Runtime's own optimized graph which kernels really run, and what fell back to float."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from lamina.backends.backend import Audit, Target
from lamina.backends.ort_probe import kernels_of

if TYPE_CHECKING:
    from lamina.backends.onnxruntime import OnnxRuntime

SURVIVING = "DequantizeLinear:weight"  # a weight converted to float on every run
_FLOAT = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"})
# what stays of a carrier that did not become integer; Pad, Concat and MaxPool work on either type alike
_ARITHMETIC = _FLOAT | {"Add", "Sum", "GlobalAveragePool", "AveragePool", "ReduceMean"}
_VIEWS = frozenset({"Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Identity", "DequantizeLinear"})
# the layout and graph transformers rename what they replace
_SUFFIX = re.compile(r"(?:_token_\d+|_nchwc|_nhwc)+$")


def audit(backend: OnnxRuntime, model: ir.Model, target: Target, planned: Mapping[str, str]) -> Audit:
    """Compile ``model``, count kernels by operator type, list what runs as something else than planned.

    Two things count as fallen back: a float Conv, MatMul or Gemm whose weight comes through a surviving
    DequantizeLinear, and a node in ``planned`` that did not become a kernel of its option. A planned node is
    found by its name or, where fusion renamed it, by its weight.

    Args:
        backend: Compiles.
        model: The model as it would be deployed.
        target: Where.
        planned: Node name -> option name; options that need no special kernel are skipped.

    Raises:
        BackendError: The runtime refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        path = Path(folder) / "optimized.onnx"
        backend.compile_with(model, target, path)
        optimized = ir.load(path)  # weights stay in the file beside it, unread
        nodes = list(optimized.graph.all_nodes())
        counts = Counter(node.op_type for node in nodes)
        surviving = sum(1 for node in nodes if _reads_weight(node))
        if surviving:
            counts[SURVIVING] = surviving
        fallen = dict.fromkeys(_base(n.name or "") for n in nodes if _behind_dequantize(n))
        fallen.update(dict.fromkeys(_not_as_planned(model, nodes, planned)))
    return Audit(dict(sorted(counts.items())), tuple(fallen))


def _reads_weight(node: ir.Node) -> bool:
    """Whether a DequantizeLinear converts a constant of rank 2 or more (a bias is not worth counting)."""
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return False
    source = node.inputs[0]
    return source.is_initializer() and source.shape is not None and len(source.shape) > 1


def _behind_dequantize(node: ir.Node) -> bool:
    if node.op_type not in _FLOAT or len(node.inputs) < 2:
        return False
    value = node.inputs[1]
    while value is not None and (maker := value.producer()) is not None and maker.op_type in _VIEWS:
        if _reads_weight(maker):
            return True
        value = maker.inputs[0]
    return False


def _base(name: str) -> str:
    return _SUFFIX.sub("", name)


def _not_as_planned(model: ir.Model, nodes: list[ir.Node], planned: Mapping[str, str]) -> Iterator[str]:
    by_name: dict[str, list[ir.Node]] = {}
    by_weight: dict[str, list[ir.Node]] = {}
    for node in nodes:
        by_name.setdefault(_base(node.name or ""), []).append(node)
        for value in node.inputs:
            if value is not None and value.is_initializer():
                by_weight.setdefault((value.name or "").removesuffix("_T"), []).append(node)
    written, weights_of = _written(model, planned), _Weights(model)
    for name, option in planned.items():
        wanted = kernels_of(option)
        if wanted is None:
            continue
        names = written.get(name, [])
        weights = weights_of(names)
        found = {n.op_type for own in names for n in by_name.get(own, [])}
        found |= {n.op_type for own in weights for n in by_weight.get(own, [])}
        lost = not found and (weights or not names)
        if not found & wanted and (lost or found & _ARITHMETIC):
            yield name


def _written(model: ir.Model, planned: Mapping[str, str]) -> dict[str, list[str]]:
    """Original node name -> names of the nodes that stand for it: itself, or those named after it."""
    result: dict[str, list[str]] = {}
    for node in model.graph.all_nodes():
        name = node.name or ""
        result.setdefault(name, []).append(name)
        if name in planned:
            continue
        # emitted nodes are called like the node they replace, with something after a separator
        for match in re.finditer(r"[_./:](?=[^_./:])", name):
            result.setdefault(name[: match.start()], []).append(name)
    return result


class _Weights:
    """Which initializers of rank 2 or more the named nodes read, through conversions or not."""

    def __init__(self, model: ir.Model) -> None:
        self._read: dict[str, set[str]] = {}
        for node in model.graph.all_nodes():
            for value in node.inputs:
                while (
                    value is not None and (maker := value.producer()) is not None and maker.op_type in _VIEWS
                ):
                    value = maker.inputs[0]
                if value is None or not value.is_initializer() or value.shape is None or len(value.shape) < 2:
                    continue
                self._read.setdefault(node.name or "", set()).add(value.name or "")

    def __call__(self, names: list[str]) -> set[str]:
        return {weight for name in names for weight in self._read.get(name, ())}
