"""What a rule of differentiation is given, and the way back through broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class Call:
    """One node of a run.

    Attributes:
        node: The node.
        inputs: What it read; None where an input is left out.
        outputs: What it made; None where nobody reads it.
        grads: Derivative by each output; None where nothing depends on it.
        wants: Which inputs a derivative is wanted of.
        opset: Of the program.
    """

    node: ir.Node
    inputs: Sequence[np.ndarray | None]
    outputs: Sequence[np.ndarray | None]
    grads: Sequence[np.ndarray | None]
    wants: Sequence[bool]
    opset: int = 17

    @property
    def grad(self) -> np.ndarray:
        """Derivative by the first output."""
        found = self.grads[0]
        assert found is not None
        return found

    @property
    def made(self) -> np.ndarray:
        """The first output."""
        found = self.outputs[0]
        assert found is not None
        return found

    def read(self, index: int) -> np.ndarray:
        """An input that is there."""
        found = self.inputs[index]
        assert found is not None
        return found

    def given(self, index: int) -> np.ndarray | None:
        """An input that may be left out."""
        return self.inputs[index] if index < len(self.inputs) else None


Rule = Callable[[Call], Sequence[np.ndarray | None]]


def narrowed(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The derivative by an array of ``shape`` that was broadcast to the shape of ``grad``."""
    if grad.shape == shape:
        return grad
    extra = grad.ndim - len(shape)
    axes = (*range(extra), *(extra + i for i, n in enumerate(shape) if n == 1 and grad.shape[extra + i] != 1))
    return grad.sum(axis=axes, keepdims=True).reshape(shape)
