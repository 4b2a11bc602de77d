"""Reverse-mode derivatives of a program in numpy: what a change of weights does to the outputs.

The program itself runs in ONNX Runtime; only the way back is numpy, so no training framework is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lamina.analysis.adjoint_linear import LINEAR
from lamina.analysis.adjoint_rules import POINTWISE, SHAPES
from lamina.analysis.adjoint_tape import Call, Rule
from lamina.analysis.adjoint_windows import WINDOWS
from lamina.analysis.instrument import InstrumentedSession
from lamina.analysis.operators import constant
from lamina.analysis.suffix import open_after
from lamina.errors import UnsupportedOperator
from lamina.ir.program import Program

RULES: Mapping[str, Rule] = {**POINTWISE, **SHAPES, **LINEAR, **WINDOWS}


class Adjoint:
    """A program that can be run and differentiated, with some of its initializers free.

    Args:
        program: Left unchanged.
        free: Initializers that each run is given, and by which it is differentiated.
        outputs: Outputs of the program that are differentiated.
        threads: Threads of a run; all available cores when None.

    Raises:
        UnsupportedOperator: An operator between a free initializer and an output has no rule.
        BackendError: ONNX Runtime refuses the program.
    """

    def __init__(
        self, program: Program, free: Sequence[str], outputs: Sequence[str], *, threads: int | None = None
    ) -> None:
        clone = program.clone()
        self._nodes = _between(clone.graph, free, outputs)
        self._opset = clone.graph.opset_imports.get("", 0)
        for node in self._nodes:
            if node.op_type not in RULES or node.domain:
                raise UnsupportedOperator(
                    f"{node.op_type} has no derivative here",
                    where=f"node '{node.name}'",
                    advice="round operator by operator: Rounding('descent')",
                )
        self._outputs, self._free = list(outputs), list(free)
        self._ends = {n.name or "": n.outputs[0].name or "" for n in self._nodes}
        self._fixed: dict[str, np.ndarray] = {}
        needed: dict[str, None] = dict.fromkeys(outputs)
        inputs = {v.name for v in program.graph.inputs} - set(program.graph.initializers)
        for node in self._nodes:
            for value in (*node.inputs, *node.outputs):
                if value is None or not (name := value.name) or name in free:
                    continue
                if (array := constant(value)) is not None:
                    self._fixed[name] = array
                elif name not in inputs and (value.uses() or name in outputs):
                    needed[name] = None
        self._needed = list(needed)
        piece, reads = open_after(clone, inputs, self._needed)  # type: ignore[arg-type]
        self._reads = reads
        self._given = [name for name in self._free if name in piece.graph.initializers]
        for name in self._given:
            value = piece.graph.initializers.pop(name)
            value.const_value = None
            piece.graph.inputs.append(value)
        self._session = InstrumentedSession(piece, threads=threads, own=True)

    def output_of(self, node: str) -> str:
        """Name of the first output of a node; empty where no output of the program depends on it."""
        return self._ends.get(node, "")

    def run(
        self,
        feeds: Mapping[str, np.ndarray],
        weights: Mapping[str, np.ndarray],
        *,
        outputs_only: bool = False,
    ) -> dict[str, np.ndarray]:
        """Every value that :meth:`back` needs, the outputs among them.

        Args:
            feeds: Model inputs.
            weights: The free initializers.
            outputs_only: Leave the other values out; :meth:`back` needs them.

        Raises:
            DataError: ONNX Runtime refuses the feeds.
        """
        given = {label: feeds[name] for label, name in self._reads.items()} | {
            name: weights[name] for name in self._given
        }
        names = self._outputs if outputs_only else self._needed
        made = dict(zip(names, self._session.run(names, given), strict=True))
        return made if outputs_only else {**self._fixed, **feeds, **weights, **made}

    def back(
        self,
        values: Mapping[str, np.ndarray],
        seeds: Mapping[str, np.ndarray],
        also: Collection[str] = (),
    ) -> dict[str, np.ndarray]:
        """Derivatives by the free initializers, and by the values named in ``also``.

        Args:
            values: From :meth:`run`.
            seeds: Output -> derivative of the function by it.
            also: Names of values.

        Returns:
            Name -> array of the value's shape, float32; what nothing depends on is left out.
        """
        kept, wanted = {*also, *self._free}, set(self._free)
        wanted.update(v.name or "" for n in self._nodes for v in n.outputs)
        found = {name: np.asarray(seed, np.float32) for name, seed in seeds.items()}
        for node in reversed(self._nodes):
            grads = [found.get(v.name or "") for v in node.outputs]
            for value in node.outputs:
                if value.name not in kept:
                    found.pop(value.name or "", None)
            if all(g is None for g in grads):
                continue
            names = ["" if v is None else v.name or "" for v in node.inputs]
            call = Call(
                node,
                [values.get(name) for name in names],
                [values.get(v.name or "") for v in node.outputs],
                grads,
                [name in wanted for name in names],
                self._opset,
            )
            for name, part in zip(names, RULES[node.op_type](call), strict=False):
                if part is not None and name in wanted:
                    found[name] = found[name] + part if name in found else part
        return {name: found[name] for name in kept if name in found}


def _between(graph: ir.Graph, free: Collection[str], outputs: Collection[str]) -> list[ir.Node]:
    """Nodes through which a free initializer reaches an output, in execution order."""
    moved = {v for name, v in graph.initializers.items() if name in free}
    ahead = []
    for node in graph:
        if any(v in moved for v in node.inputs if v is not None) and node.op_type not in ("Shape", "Size"):
            ahead.append(node)
            moved.update(node.outputs)
    needed = {v for v in graph.outputs if v.name in outputs}
    found = []
    for node in reversed(ahead):
        if any(v in needed for v in node.outputs):
            found.append(node)
            needed.update(v for v in node.inputs if v is not None and v in moved)
    return found[::-1]
