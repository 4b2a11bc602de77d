"""What folding must keep: the names, data types and ranks of a program's inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lamina.errors import VerificationError
from lamina.ir.program import Program


@dataclass(frozen=True)
class _Declared:
    name: str | None
    type: ir.TypeProtocol | None
    dtype: ir.DataType | None
    shape: ir.Shape | None

    @classmethod
    def by(cls, value: ir.Value) -> _Declared:
        return cls(value.name, value.type, value.dtype, None if value.shape is None else value.shape.copy())


class Original:
    """What was folded, and its interface, which stays known when the program is used up.

    Attributes:
        program: What was folded.
        inputs: What it declared of its inputs, without initializers that are also listed as inputs.
        outputs: What it declared of its outputs.
    """

    def __init__(self, program: Program) -> None:
        self.program, graph = program, program.graph
        self.inputs = [_Declared.by(v) for v in graph.inputs if v.name not in graph.initializers]
        self.outputs = [_Declared.by(v) for v in graph.outputs]


def keep_interface(pass_name: str, model: ir.Model, original: Original) -> None:
    """Restore the shapes a pass only refined (a dimension it inferred); refuse what it changed.

    Raises:
        VerificationError: Names, data types or ranks are others; names the pass.
    """
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    for what, now, then in (
        ("inputs", inputs, original.inputs),
        ("outputs", list(model.graph.outputs), original.outputs),
    ):
        names, wanted = [v.name for v in now], [v.name for v in then]
        if names != wanted:
            raise _broken(pass_name, f"the {what}", names, wanted)
        for value, before in zip(now, then, strict=True):
            _keep_port(pass_name, value, before)


def _keep_port(pass_name: str, value: ir.Value, before: _Declared) -> None:
    if value.type is None:  # a library puts an Identity before an output and does not say what it gives
        value.type = before.type
    if value.dtype is not None and before.dtype is not None and value.dtype != before.dtype:
        raise _broken(pass_name, f"the data type of '{value.name}'", value.dtype.name, before.dtype.name)
    if before.shape is None:
        return
    if value.shape is not None and len(value.shape) != len(before.shape):
        raise _broken(pass_name, f"the rank of '{value.name}'", len(value.shape), len(before.shape))
    value.shape = before.shape.copy()


def _broken(pass_name: str, what: str, got: object, expected: object) -> VerificationError:
    return VerificationError(
        f"after {pass_name}: {what} changed from {expected} to {got}",
        advice="this is a bug in the pass; leave it out with only=[...] and report it",
    )
