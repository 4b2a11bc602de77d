"""Write fused operators as plain ones, so that analyses and transforms see through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx
import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.inference import infer_shapes
from lamina.ir.names import subgraphs
from lamina.ir.opset import raise_opset
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewrite, Rewriter
from lamina.ir.verify import verify_structure
from lamina.passes.fold import unfuse_attention, unfuse_contrib
from lamina.passes.fold.unfuse_body import body_of, instantiate

# What a fused node's rule gives: one value an output (None for one it leaves out), or why it does nothing.
Unfused = Sequence[ir.Value | None] | str
Rule = Callable[[ir.Node, Rewriter], Unfused]

_NAME = "unfuse"
_ROUNDS = 4  # a rule may need a rank that only plain operators let inference find
_CONTRIB = "com.microsoft"
_NORMS = frozenset({"SkipLayerNormalization", "EmbedLayerNormalization"})

RULES: dict[str, Rule] = {
    "SkipLayerNormalization": unfuse_contrib.skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": unfuse_contrib.skip_simplified_layer_normalization,
    "EmbedLayerNormalization": unfuse_attention.embed_layer_normalization,
    "Attention": unfuse_attention.attention,
    "BiasGelu": unfuse_contrib.bias_gelu,
    "Gelu": unfuse_contrib.gelu,
    "FastGelu": unfuse_contrib.fast_gelu,
    "QuickGelu": unfuse_contrib.quick_gelu,
    "FusedMatMul": unfuse_contrib.fused_matmul,
    "FusedGemm": unfuse_contrib.fused_gemm,
    "FusedConv": unfuse_contrib.fused_conv,
}


def unfuse(
    program: Program, names: Sequence[str] | None = None
) -> tuple[Program, tuple[str, ...], list[Rewrite]]:
    """Rewrite fused operators of a clone of ``program`` to plain operators of the same function.

    It is the inverse of a fusion: for analysis, for other runtimes, and for transforms of what is inside.
    No fold applies it, since what a runtime fuses is mostly faster.

    Args:
        program: What to rewrite; it is not changed.
        names: Operators to rewrite: of ONNX Runtime (``com.microsoft.Gelu``; the domain may be left out
            where the standard has no operator of that name), or standard ones that the standard defines by
            a function of others (``Gelu``, ``LayerNormalization``, ``RMSNormalization``, ``Attention``,
            ``RotaryEmbedding``, ...). All of ONNX Runtime's when omitted.

    Returns:
        The rewritten program, the names of the operators that were rewritten, and every change. A node that
        was left alone is among the changes too, with the reason.

    Raises:
        PassError: A name is neither.
        UnsupportedOperator: LayerNormalization needs opset 17, and the program cannot be raised to it.
    """
    wanted = [f"{_CONTRIB}.{n}" for n in RULES] if names is None else [_identifier(n, program) for n in names]
    model = program.clone().model
    _raise_opset(model, set(wanted))
    rewriter = Rewriter(model)
    changed: dict[str, None] = {}
    for last in range(_ROUNDS):
        found, left = _sweep(rewriter, set(wanted))
        changed.update(dict.fromkeys(found))
        if found:
            infer_shapes(model)
        if not (found and left) or last == _ROUNDS - 1:
            rewriter.records.extend(left)
            break
    if changed:
        verify_structure(model, _NAME)
    return program.with_model(model), tuple(changed), rewriter.records


def _sweep(rewriter: Rewriter, wanted: set[str]) -> tuple[list[str], list[Rewrite]]:
    """Rewrite what can be: the operators that were, and what was left, with the reasons."""
    found, left = [], []
    for graph in list(_graphs(rewriter.model.graph)):
        main = graph is rewriter.model.graph
        inner = rewriter if main else Rewriter(rewriter.model, graph, parent=rewriter)
        for node in [n for n in graph if _label(n) in wanted]:
            reason = _unfuse(node, inner)
            if reason is None:
                found.append(_label(node))
            else:
                why = f"{node.op_type} left as it is: {reason}"
                left.append(Rewrite(_NAME, node.name or node.op_type, why))
    return found, left


def _label(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _identifier(name: str, program: Program) -> str:
    known = name.removeprefix(f"{_CONTRIB}.")
    if known in RULES and (known != name or not onnx.defs.has(name)):
        return f"{_CONTRIB}.{known}"
    if body_of(name, program.opset) is not None:
        return name
    raise PassError(
        f"there is no rule for unfusing '{name}' at opset {program.opset}",
        advice=f"choose from {', '.join(f'{_CONTRIB}.{n}' for n in RULES)}, or a standard operator"
        " that ONNX defines by a function, such as Gelu or LayerNormalization",
    )


def _raise_opset(model: ir.Model, wanted: set[str]) -> None:
    fused = {f"{_CONTRIB}.{n}" for n in _NORMS} & wanted
    if any(_label(n) in fused for n in model.graph.all_nodes()):
        raise_opset(model, 17)


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        for inner in subgraphs(node):
            yield from _graphs(inner)


def _unfuse(node: ir.Node, rewriter: Rewriter) -> str | None:
    """Replace one node, or say why not."""
    label = where = node.name or node.op_type
    rewriter.at(node)
    found = RULES[node.op_type](node, rewriter) if node.domain == _CONTRIB else instantiate(node, rewriter)
    rewriter.at(None)
    if isinstance(found, str):
        return found
    node.name = rewriter.fresh(f"{label}_before")
    for old, new in zip(node.outputs, found, strict=False):
        if new is not None:
            _take_over(old, new, label, rewriter)
            label = rewriter.fresh(label)
    rewriter.remove([node])
    rewriter.record(_NAME, where, f"{node.op_type} written as plain operators")
    return None


def _take_over(old: ir.Value, new: ir.Value, label: str, rewriter: Rewriter) -> None:
    """Give ``new`` the name, type, shape and readers of ``old``, and its node the name of the fused one."""
    name, producer = old.name, new.producer()
    assert producer is not None
    producer.name = label
    new.shape, new.type = (old.shape or new.shape), (old.type or new.type)
    if not old.is_graph_output():  # the rewriter names an output, whether it can be renamed or not
        old.name = rewriter.fresh(f"{name}_before")
        new.name = name
    rewriter.replace_uses(old, new)
