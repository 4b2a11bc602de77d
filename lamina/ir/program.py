"""A program: one captured model with its interface. Immutable to the outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir

from lamina.errors import UnsupportedOperator

Dim = int | str | None


@dataclass(frozen=True)
class Port:
    """One input or output of a program.

    Attributes:
        name: Tensor name.
        dtype: Element type.
        shape: One entry a dimension: an int, the name of a dynamic dim, or None where unknown.
        kind: ``tensor``, ``sequence``, ``optional``, ``sparse tensor`` or ``map``.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[Dim, ...]
    kind: str = "tensor"

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The numpy dtype of this port."""
        return np.dtype(self.dtype.numpy())


@dataclass(frozen=True)
class Interface:
    """What a program takes and gives; it stays when the program is gone.

    Attributes:
        source: Where the program came from, for messages.
        inputs: Without initializers that are also listed as inputs.
        outputs: All of them.
    """

    source: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def require_tensors(self) -> None:
        """Say that a sequence, an optional or a map at the interface is more than the caller can handle.

        Raises:
            UnsupportedOperator: An input or output is not a tensor; names it.
        """
        for port in (*self.inputs, *self.outputs):
            if port.kind != "tensor":
                raise UnsupportedOperator(
                    f"'{port.name}' is not a tensor but a {port.kind}",
                    where=self.source,
                    advice="give a model whose inputs and outputs are tensors; this one can only be folded",
                )


@dataclass(frozen=True)
class Program:
    """One ``onnx_ir.Model`` and its interface.

    Every node has a unique, non-empty name; every value too, but an omitted optional output (its name is
    empty and nobody reads it). Transforms work on :meth:`clone`.

    Attributes:
        model: The model. Never mutate it: take ``clone().model``.
        source: Where it came from, for messages.
        example: Example inputs, one array an input.
        example_is_synthetic: Whether ``example`` was made up from shapes.
    """

    model: ir.Model
    source: str = "<memory>"
    example: Mapping[str, np.ndarray] = field(default_factory=dict)
    example_is_synthetic: bool = True

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph

    @cached_property
    def inputs(self) -> tuple[Port, ...]:
        """Interface inputs, without initializers that are also listed as inputs."""
        return tuple(_port(v) for v in self.graph.inputs if v.name not in self.graph.initializers)

    @cached_property
    def outputs(self) -> tuple[Port, ...]:
        """Interface outputs."""
        return tuple(_port(v) for v in self.graph.outputs)

    @property
    def interface(self) -> Interface:
        """Inputs and outputs by themselves."""
        return Interface(self.source, self.inputs, self.outputs)

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return self.model.opset_imports.get("", 1)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the program computes with; stable over node names, value names and node order."""
        from lamina.ir.fingerprint import fingerprint

        return fingerprint(self.model)

    def require_tensors(self) -> None:
        """:meth:`Interface.require_tensors` of this program's.

        Raises:
            UnsupportedOperator: An input or output is not a tensor; names it.
        """
        self.interface.require_tensors()

    def clone(self) -> Program:
        """A copy whose graph can be changed; weights are shared, so it costs nodes, not bytes."""
        return Program(self.model.clone(), self.source, self.example, self.example_is_synthetic)

    def with_model(self, model: ir.Model) -> Program:
        """The same interface data around another model."""
        return Program(model, self.source, self.example, self.example_is_synthetic)


_KINDS: dict[type, str] = {
    ir.SequenceType: "sequence",
    ir.OptionalType: "optional",
    ir.SparseTensorType: "sparse tensor",
}


def _port(value: ir.Value) -> Port:
    shape: tuple[Dim, ...] = ()
    if value.shape is not None:
        shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    kind = "tensor" if value.type is None else _KINDS.get(type(value.type), "tensor")
    return Port(value.name or "", value.dtype or ir.DataType.UNDEFINED, shape, kind)
