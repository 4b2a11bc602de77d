"""What a residual branch is (attention, MLP, conv, recurrent), what it is called, and which ones repeat."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import Literal

import onnx_ir as ir

from lamina.ir.branch_view import GraphView, Region, words

BranchKind = Literal["attention", "mlp", "conv", "recurrent", "other"]
_ATTENTION = words(
    "Attention MultiHeadAttention GroupQueryAttention PackedAttention PackedMultiHeadAttention QAttention "
    "DecoderMaskedMultiHeadAttention SparseAttention PagedAttention LongformerAttention"
)
_CONV = words("Conv ConvTranspose ConvInteger QLinearConv FusedConv NhwcFusedConv")
_RECURRENT = words("LSTM GRU RNN DynamicQuantizeLSTM")
_PRODUCT = words("MatMul FusedMatMul Einsum Gemm MatMulInteger TransposeMatMul")
# What may stand between the product of queries and keys, the Softmax, and the product with the values.
_BETWEEN = words(
    "Mul Div Add Sub Where Cast Dropout Reshape Transpose Squeeze Unsqueeze Identity Clip Tanh IsNaN "
    "QuantizeLinear DequantizeLinear Max Min Expand Concat Slice"
)
_MAX_PERIOD = 8


def kind_of(view: GraphView, region: Region) -> BranchKind:
    """Tell a branch's kind from the operators it contains."""
    weighted = 0
    types = set()
    for position in sorted(region.members):
        node = view.nodes[position]
        types.add(node.op_type)
        weighted += view.is_weighted(position)
        if node.op_type in _ATTENTION or (node.op_type in _PRODUCT and _mixes_by_softmax(view, position)):
            return "attention"
    if types & _RECURRENT:
        return "recurrent"
    if types & _CONV:
        return "conv"
    return "mlp" if weighted >= 2 else "other"


def _mixes_by_softmax(view: GraphView, position: int) -> bool:
    """Whether this is ``softmax(product) @ data``: the second product of an attention."""
    data = [v for v in view.nodes[position].inputs if view.is_data(v)]
    if len(data) < 2:
        return False
    for value in data:
        softmax = _behind(view, value, frozenset(("Softmax",)), 16)
        if softmax is not None and _behind(view, view.nodes[softmax].inputs[0], _PRODUCT, 48) is not None:
            return True
    return False


def _behind(view: GraphView, value: ir.Value | None, wanted: frozenset[str], limit: int) -> int | None:
    """The nearest node of a wanted type that makes ``value``, through scaling, masking and reshaping."""
    pending: list[ir.Value | None] = [value]
    seen: set[int] = set()
    while pending and len(seen) < limit:
        current = pending.pop(0)
        position = None if current is None else view.producer.get(current)
        if position is None or position in seen:
            continue
        seen.add(position)
        node = view.nodes[position]
        if node.op_type in wanted:
            return position
        if node.op_type in _BETWEEN:
            pending.extend(v for v in node.inputs if view.is_data(v))
    return None


# -- names --------------------------------------------------------------------------------------------


def scope_path(view: GraphView, members: Iterable[int]) -> str:
    """The longest module path that all weighted operators of a branch share, or ''."""
    paths = []
    for position in sorted(members):
        if view.is_weighted(position):
            path = _module_of(view, position)
            if path:
                paths.append(path.split("."))
    if not paths:
        return ""
    common = paths[0]
    for other in paths[1:]:
        n = 0
        while n < min(len(common), len(other)) and common[n] == other[n]:
            n += 1
        common = common[:n]
    return ".".join(common)


def _module_of(view: GraphView, position: int) -> str:
    node = view.nodes[position]
    recorded = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if recorded:
        try:
            scopes = [s for s in ast.literal_eval(recorded)[:-1] if s]
        except (ValueError, SyntaxError, TypeError):
            scopes = []
        if scopes:
            return str(scopes[-1])
    for value in view.reads[position]:
        if value.is_initializer() and _looks_like_a_path(value.name or ""):
            return (value.name or "").rpartition(".")[0]
    return _bias_module(view, position) or _path_of_node_name(node.name or "")


def _bias_module(view: GraphView, position: int) -> str:
    """A MatMul's transposed weight has no name any more, but the bias added next still has."""
    for value in view.nodes[position].outputs[:1]:
        for reader in view.readers.get(value, ())[:2]:
            if view.nodes[reader].op_type == "Add":
                for other in view.reads[reader]:
                    if other.is_initializer() and _looks_like_a_path(other.name or ""):
                        return (other.name or "").rpartition(".")[0]
    return ""


def _looks_like_a_path(name: str) -> bool:
    head, _, tail = name.rpartition(".")
    return bool(head) and tail.isidentifier() and not any(c in name for c in " :/")


def _path_of_node_name(name: str) -> str:
    """``/encoder/layer.0/attention/self/query/MatMul`` -> ``encoder.layer.0.attention.self.query``."""
    parts = [p for p in name.split("/") if p]
    return ".".join(parts[:-1]) if name.startswith("/") and len(parts) > 1 else ""


def unique_names(paths: Sequence[str], kinds: Sequence[BranchKind]) -> list[str]:
    """One name a branch: its module path, with its kind where the path alone would not tell it apart."""
    counts: dict[str, int] = {}
    above: set[str] = set()
    for path in paths:
        counts[path] = counts.get(path, 0) + 1
    for path in set(paths):
        parts = path.split(".")
        above.update(".".join(parts[:n]) for n in range(1, len(parts)))
    names: list[str] = []
    taken: set[str] = set()
    for k, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
        name = f"branch.{k}.{kind}"
        if path:
            name = f"{path}.{kind}" if counts[path] > 1 or path in above else path
        base, n = name, 1
        while name in taken:
            name, n = f"{base}.{n}", n + 1
        taken.add(name)
        names.append(name)
    return names


# -- repetition ---------------------------------------------------------------------------------------


def repeating_runs(signatures: Sequence[object]) -> list[tuple[int, int, int]]:
    """Cut a sequence into runs ``(start, period, repeats)``; what does not repeat is a run of one.

    At each place the period (at most 8) that covers the most wins, the shortest among equals.
    Cost: O(8 n).
    """
    runs: list[tuple[int, int, int]] = []
    start, n = 0, len(signatures)
    while start < n:
        best = (1, 1)
        for period in range(1, _MAX_PERIOD + 1):
            end = start + period
            while end < n and signatures[end] == signatures[end - period]:
                end += 1
            repeats = (end - start) // period
            if repeats > 1 and repeats * period > best[0] * best[1]:
                best = (period, repeats)
        runs.append((start, *best))
        start += best[0] * best[1]
    return runs
