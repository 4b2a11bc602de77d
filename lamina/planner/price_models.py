"""Micro-models for pricing: one site cut out of its program, as it is or in one of its options.

A unit reads the site's activations as inputs, in the shapes a case really has, and exposes its outputs.
Replicas of it in one model share the memory of the inputs but not the inputs themselves, so that no runtime
merges work the real program does at every site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.errors import BackendError
from lamina.ir.names import reads
from lamina.ir.opset import raise_opset
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Site, Transform
from lamina.planner.apply import emit_move, required_opset
from lamina.planner.plan import Move
from lamina.planner.price_signature import constant_of

Observed = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


@dataclass
class Unit:
    """One site as a model of its own.

    Attributes:
        model: The model; its inputs have concrete shapes.
        sources: Input name -> name of the program's value whose content feeds it.
        quantized: Input name -> (scale, zero point) it is quantized with before it is fed.
    """

    model: ir.Model
    sources: dict[str, str]
    quantized: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def feeds(self, captured: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays to run the unit on, from the program's own values."""
        result = {}
        for name, source in self.sources.items():
            array = captured[source]
            if name in self.quantized:
                array = _codes(array, *self.quantized[name])
            result[name] = array
        return result

    @property
    def weight_bytes(self) -> int:
        """Bytes of the unit's constants."""
        values = self.model.graph.initializers.values()
        return sum(v.const_value.nbytes for v in values if v.const_value is not None)


class Extractor:
    """Cuts sites out of one program.

    Args:
        program: The program; it is not changed, its weights are shared.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._nodes = {n.name: n for n in program.graph if n.name}
        self._position = {name: i for i, name in enumerate(self._nodes)}

    def extract(self, site: Site, observed: Observed) -> Unit:
        """The site's nodes, untouched, in the shapes of ``observed``.

        Raises:
            BackendError: A node is missing, or a value the site reads is no tensor.
        """
        missing = [n for n in site.nodes if n not in self._nodes]
        if missing:
            raise BackendError(
                f"site '{site.name}' names node '{missing[0]}', which the program does not have"
            )
        nodes = [self._nodes[n] for n in sorted(site.nodes, key=self._position.__getitem__)]
        model, mapping, sources = self._boundary(nodes, site, observed)
        for node in nodes:
            model.graph.append(copy_node(node, mapping))
        for old, new in mapping.items():
            known = observed.get(old.name or "")
            if known is not None and not new.is_initializer():
                new.shape = ir.Shape(known[0])
                new.type = old.type or ir.TensorType(ir.DataType.from_numpy(known[1]))
        by_name = {old.name: new for old, new in mapping.items()}
        model.graph.outputs.extend(by_name[name] for name in site.outputs)
        return Unit(model, sources)

    def lend(self, unit: Unit, weights: Sequence[str]) -> None:
        """Give a unit weights of other sites, for an option that reads them."""
        for name in weights:
            value = self.program.graph.initializers.get(name)
            if value is not None and name not in unit.model.graph.initializers:
                tensor = value.const_value
                made = ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
                unit.model.graph.register_initializer(made)

    def _boundary(
        self, nodes: Sequence[ir.Node], site: Site, observed: Observed
    ) -> tuple[ir.Model, dict[ir.Value, ir.Value], dict[str, str]]:
        """An empty model with what ``nodes`` read from outside as inputs and initializers."""
        source = self.program.model
        inside = {v for node in nodes for v in node.outputs}
        inputs, constants = [], []
        mapping: dict[ir.Value, ir.Value] = {}
        for value in dict.fromkeys(v for node in nodes for v in reads(node)):
            if value in inside:
                continue
            tensor = constant_of(value)
            if tensor is None and value.name not in observed:
                raise BackendError(f"site '{site.name}' reads '{value.name}', which is no tensor of the run")
            new = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=tensor)
            if tensor is None:
                new.type = ir.TensorType(ir.DataType.from_numpy(observed[str(value.name)][1]))
                inputs.append(new)
            else:
                new.type, new.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
                constants.append(new)
            mapping[value] = new
        graph = ir.Graph(
            inputs,
            [],
            nodes=[],
            initializers=constants,
            opset_imports=dict(source.opset_imports),
            name="unit",
        )
        model = ir.Model(graph, ir_version=source.ir_version, functions=list(source.functions.values()))
        return model, mapping, {str(v.name): str(v.name) for v in inputs}


def emit_option(unit: Unit, site: Site, transform: Transform, option: Option) -> None:
    """Replace the unit's nodes by an option's; int8 borders lose their conversions.

    Raises:
        PassError: The transform cannot emit the option here.
    """
    move = Move(site, option)
    raise_opset(unit.model, required_opset([move]))
    emit_move(transform, move, Rewriter(unit.model))
    _sweep(unit.model.graph)
    if option.input_form == "int8":
        _cut_inputs(unit)
    if option.output_form == "int8":
        _cut_outputs(unit.model.graph)
    _sweep(unit.model.graph)
    read = {v.name for v in unit.model.graph.inputs}
    unit.sources = {name: source for name, source in unit.sources.items() if name in read}


def replicate(unit: Unit, count: int) -> tuple[ir.Model, dict[str, str]]:
    """``count`` independent copies in one model; the weights of each are its own once serialized.

    Returns:
        The model, and its input names beyond the first copy's with the input each repeats.
    """
    source = unit.model
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(source.opset_imports), name="unit")
    aliases: dict[str, str] = {}
    for i in range(count):
        suffix = f"__{i}" if i else ""
        mapping: dict[ir.Value, ir.Value] = {}
        for value in (*source.graph.inputs, *source.graph.initializers.values()):
            new = ir.Value(
                name=f"{value.name}{suffix}",
                type=value.type,
                shape=value.shape,
                const_value=value.const_value,
            )
            mapping[value] = new
            if value.is_initializer():
                graph.register_initializer(new)
            else:
                graph.inputs.append(new)
                if i:
                    aliases[str(new.name)] = str(value.name)
        graph.extend([copy_node(node, mapping, suffix) for node in source.graph])
        graph.outputs.extend(mapping[v] for v in source.graph.outputs)
    return ir.Model(graph, ir_version=source.ir_version, functions=list(source.functions.values())), aliases


# -- copying ----------------------------------------------------------------------------------------


def copy_node(node: ir.Node, mapping: dict[ir.Value, ir.Value], suffix: str = "") -> ir.Node:
    """A copy that reads what ``mapping`` says; its outputs are added to ``mapping``."""
    inputs = [None if v is None else mapping[v] for v in node.inputs]
    new = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        [_copy_attribute(a, mapping) for a in node.attributes.values()],
        overload=node.overload,
        num_outputs=len(node.outputs),
        name=f"{node.name}{suffix}" if node.name else None,
    )
    for old, fresh in zip(node.outputs, new.outputs, strict=True):
        fresh.name = f"{old.name}{suffix}" if old.name else ""
        fresh.type, fresh.shape = old.type, old.shape
        mapping[old] = fresh
    return new


def _copy_attribute(attribute: ir.Attr, mapping: Mapping[ir.Value, ir.Value]) -> ir.Attr:
    if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return attribute
    single = attribute.type == ir.AttributeType.GRAPH
    graphs = [attribute.as_graph()] if single else list(attribute.as_graphs())
    copies = [graph.clone(allow_outer_scope_values=True) for graph in graphs]
    for copy in copies:
        for node in copy.all_nodes():
            for i, value in enumerate(node.inputs):
                if value is not None and value in mapping:
                    node.replace_input_with(i, mapping[value])
        copy.outputs[:] = [mapping.get(v, v) for v in copy.outputs]
    return ir.Attr(attribute.name, attribute.type, copies[0] if single else copies)


def _sweep(graph: ir.Graph) -> None:
    """Remove nodes, initializers and inputs nobody reads."""
    for node in reversed(list(graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    for i, value in reversed(list(enumerate(graph.inputs))):
        if not value.uses() and not value.is_graph_output():
            del graph.inputs[i]


# -- int8 borders -----------------------------------------------------------------------------------


def _cut_inputs(unit: Unit) -> None:
    """Feed integers where the option's own QuantizeLinear would make them."""
    graph = unit.model.graph
    for value in list(graph.inputs):
        for node, index in [(use.node, use.idx) for use in value.uses()]:
            if node.op_type != "QuantizeLinear" or index != 0 or len(node.inputs) < 3:
                continue
            scale, zero = (_array(v) for v in node.inputs[1:3])
            if scale is None or zero is None:
                continue
            codes = node.outputs[0]
            made = ir.Value(name=f"{codes.name}_fed", type=ir.TensorType(_integer(zero)), shape=value.shape)
            graph.inputs.append(made)
            unit.sources[str(made.name)] = unit.sources[str(value.name)]
            unit.quantized[str(made.name)] = (scale, zero)
            for use in tuple(codes.uses()):
                use.node.replace_input_with(use.idx, made)
            graph.outputs[:] = [made if v is codes else v for v in graph.outputs]


def _cut_outputs(graph: ir.Graph) -> None:
    """Hand out the integers a final DequantizeLinear would convert back."""
    for i, value in enumerate(graph.outputs):
        last = value.producer()
        if last is None or last.op_type != "DequantizeLinear" or last.inputs[0] is None:
            continue
        codes = last.inputs[0]
        maker = codes.producer()
        if maker is not None and maker.op_type == "QuantizeLinear":
            zero = _array(maker.inputs[2]) if len(maker.inputs) > 2 else None
            codes.type = ir.TensorType(ir.DataType.UINT8 if zero is None else _integer(zero))
            codes.shape = value.shape if codes.shape is None else codes.shape
            graph.outputs[i] = codes


def _array(value: ir.Value | None) -> np.ndarray | None:
    tensor = None if value is None else constant_of(value)
    return None if tensor is None else tensor.numpy()


def _integer(zero: np.ndarray) -> ir.DataType:
    return ir.DataType.from_numpy(zero.dtype)


def _codes(array: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """What QuantizeLinear gives (per tensor): rounding half to even, saturating."""
    limits = np.iinfo(zero.dtype)
    rounded = np.rint(np.nan_to_num(array.astype(np.float32)) / scale.reshape(())) + zero.reshape(())
    return np.clip(rounded, limits.min, limits.max).astype(zero.dtype)
