"""Apply the pattern rules of onnxscript that hold for every input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import onnx_ir as ir

from lamina.ir.names import every_node
from lamina.passes.fold.library import LibraryFold
from lamina.passes.pass_ import Effect, Rounding

# Left out on purpose: successive_clip and min/max rules (disjoint ranges give another value), slice_split
# (odd sizes split elsewhere), flatten_to_reshape and reshape-matmul-reshape rules (nothing gained, empty
# batches break), matmul_add_to_gemm, affine_conv and expand rules (need shapes that may be unknown).
# trap: mul_by_1, add_0, sub_0 and div_by_1 compare within 1e-5 and 1e-8, and so remove a layer
# normalization's epsilon; see _neutral_rules.
RULES: tuple[str, ...] = (
    "dropout_zero_rule",
    "dropout_inference_rule",
    "cast_cast_rule",
    "no_op_cast_rule",
    "no_op_expand_rule",
    "no_op_transpose_rule",
    "transpose_transpose_rule",
    "unsqueeze_unsqueeze_rule",
    "reshape_reshape_rule",
    "squeeze_reshape_1d_rule",
    "collapse_slice_rule",
    "collapse_slice2_rule",
    "materialize_reshape_shape_rule",
    "successive_relu_rule",
    "normalize_pad_format_conv_rule",
    "fuse_pad_into_conv_rule",
    "fuse_batchnorm_into_conv_rule",
    "fuse_batchnorm_into_conv_transpose_rule",
    "fuse_batchnorm_into_gemm_rule",
    "remove_optional_bias_from_conv_rule",
    "remove_optional_bias_from_conv_transpose_rule",
    "remove_optional_bias_from_gemm_rule",
)


@dataclass(frozen=True)
class SimplifyPatterns(LibraryFold):
    """Remove no-ops, merge chains of reshapes and casts, fold BatchNormalization and Pad into convolutions.

    Refuses: BatchNormalization and Dropout in training mode (fenced).
    Effect: Rounding, <= 8 ulps of max|y|: folding a normalization reassociates one multiply and one add.
    Cost: linear in the nodes: a node meets only the rules of its operator, and every pattern has one output
    (onnxscript's matcher is quadratic for patterns of several, _matcher.py:393).
    Source: onnxscript.rewriter.rules.common; Jacob et al. 2018, arXiv:1712.05877, sec. 3.2.
    """

    effect: ClassVar[Effect] = Rounding(ulps=8)

    def run(self, model: ir.Model) -> None:
        """Call the library."""
        from onnxscript.rewriter import RewritePass

        rules = _rules(model)
        rules.reset()
        RewritePass([rules])(model)

    def idle(self, model: ir.Model) -> bool:
        """Whether no rule matches anywhere: a second run that finds nothing cost as much as the first."""
        rules = _rules(model)
        return not any(rules.matches(model, node) for node in every_node(model.graph))


def _rules(model: ir.Model) -> _ByRoot:
    # trap: this rule writes allowzero, which Reshape has since opset 14
    return _rules_without("materialize_reshape_shape_rule" if model.opset_imports.get("", 1) < 14 else None)


@cache
def _rules_without(skipped: str | None) -> _ByRoot:
    from onnxscript.rewriter.rules import common

    return _ByRoot([*_neutral_rules(), *(getattr(common, name) for name in RULES if name != skipped)])


class _ByRoot:
    """Rules as one rule that asks, at a node, only those whose pattern may end there.

    The library asks every rule at every node: most of its time, for a set as large as this one.
    """

    def __init__(self, rules: Sequence[Any]) -> None:
        self._rules = rules
        self._by_root: dict[str, list[tuple[Any, list[_Need]]]] = {}
        for rule in rules:
            for output in rule._target_pattern.output_nodes:
                self._by_root.setdefault(output.op_type, []).append((rule, _needs(output)))
        self.reset()

    def reset(self) -> None:
        """Forget the last model: what the library reads of the rule that was applied last.

        trap: it decides at the beginning whether to sweep up at the end, which remove_nodes=False has it do;
        what the last model left there kept replaced nodes alive in the next.
        """
        self.remove_nodes, self.as_function, self.name = False, False, None

    def graph_pre_visitor(self) -> None:
        for rule in self._rules:
            if rule.graph_pre_visitor:
                rule.graph_pre_visitor()

    def graph_post_visitor(self) -> None:
        for rule in self._rules:
            if rule.graph_post_visitor:
                rule.graph_post_visitor()

    def matches(self, model: ir.Model, node: ir.Node) -> bool:
        """Whether a rule's pattern is there and its condition holds; reads only."""
        return any(rule.match(model, node.graph, node) for rule in self._possible(node))

    def _possible(self, node: ir.Node) -> Iterator[Any]:
        for rule, needs in self._by_root.get(node.op_type, ()):
            if all([need.is_met(node) for need in needs]):
                yield rule

    def try_rewrite(self, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        for rule in self._possible(node):
            delta = rule.try_rewrite(model, graph, node, **options)
            if delta is not None:
                self.remove_nodes, self.as_function, self.name = (
                    rule.remove_nodes,
                    rule.as_function,
                    rule.name,
                )
                return delta
        return None


@dataclass(frozen=True)
class _Need:
    """What a pattern wants of one input: an operator that gives it, or a certain number."""

    index: int
    op_type: str | None
    number: float | None = None

    def is_met(self, node: ir.Node) -> bool:
        """Whether it is there."""
        value = node.inputs[self.index] if self.index < len(node.inputs) else None
        if value is None:
            return False
        if self.op_type is not None:
            producer = value.producer()
            return producer is not None and producer.op_type == self.op_type
        tensor = value.const_value
        return tensor is not None and tensor.size == 1 and bool(tensor.numpy().item() == self.number)


def _needs(root: Any) -> list[_Need]:
    """What must be there for a pattern that ends in ``root`` to match, as far as it is cheap to see."""
    found = []
    for i, value in enumerate(root.inputs):
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_identifier() is not None:
            found.append(_Need(i, producer.op_type))
        elif isinstance(getattr(value, "value", None), (int, float)) and not (
            value._rel_tol or value._abs_tol
        ):
            found.append(_Need(i, None, value.value))
    return found


def _neutral_rules() -> list[Any]:
    """The removal of x * 1, x + 0, x - 0 and x / 1, where the constant is exactly that."""
    from onnxscript.rewriter import RewriteRule, pattern

    def rule(op_type: str, number: float) -> Any:
        def target(op: Any, x: Any) -> Any:
            return getattr(op, op_type)(x, pattern.Constant(number, rel_tol=0.0, abs_tol=0.0))

        return RewriteRule(target, lambda op, x: op.Identity(x))

    both_ways = [*rule("Mul", 1).commute(), *rule("Add", 0).commute()]
    return [*both_ways, rule("Sub", 0), rule("Div", 1)]
