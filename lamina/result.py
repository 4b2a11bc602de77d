"""What an optimization returns: the program, the plan, and the evidence as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.backends.backend import Target
from lamina.errors import LaminaError
from lamina.ir.program import Program
from lamina.planner.plan import Plan

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Result:
    """An optimized model with its evidence.

    Attributes:
        program: The optimized program.
        plan: The moves; ``lamina.apply(model, plan)`` reproduces the program bit for bit.
        evidence: What ``result.json`` holds; every figure measured in this run unless it says predicted.
        front: Plans found, cheapest first: predicted latency ratio, damage on selection data, moves.
    """

    program: Program
    plan: Plan
    evidence: Mapping[str, Any]
    front: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def model(self) -> onnx.ModelProto:
        """The optimized model as ``onnx.ModelProto``; over 2 GB use :meth:`save`."""
        import onnx_ir as ir

        proto: onnx.ModelProto = ir.to_proto(self.program.model)
        return proto

    @property
    def changed(self) -> bool:
        """Whether anything at all was changed."""
        plan = self.plan
        return bool(plan.moves or plan.folds or plan.finishing or plan.caches)

    def save(self, directory: str | Path) -> list[Path]:
        """Write ``model.onnx`` (and its data), ``plan.json``, ``result.json`` and the backend's files.

        Each file is written atomically, the model first; files of other names are left alone.

        Returns:
            The files written.

        Raises:
            OutputError: The directory cannot be made or written.
        """
        from lamina.backends import get_backend
        from lamina.ir.io import make_directory, save_model, write_atomic

        folder = make_directory(Path(directory))
        written = save_model(self.program.model, folder / "model.onnx")
        texts = {"plan.json": self.plan.to_json(), "result.json": self.to_json()}
        for name, text in texts.items():
            write_atomic(folder / name, text + "\n")
            written.append(folder / name)
        target = Target.parse(self.plan.target)
        return written + get_backend(target).package(self.program.model, target, folder)

    def to_json(self) -> str:
        """``result.json`` as text."""
        return json.dumps({**self.evidence, "front": list(self.front)}, indent=1, sort_keys=True)


def read_plan(plan: Plan | str | Path) -> Plan:
    """A plan from a :class:`Plan`, a ``plan.json``, or a result's directory.

    Raises:
        LaminaError: There is no readable plan there.
    """
    if isinstance(plan, Plan):
        return plan
    path = Path(plan)
    if path.is_dir():
        path = path / "plan.json"
    try:
        return Plan.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise LaminaError(f"cannot read the plan: {error}", where=str(path)) from error
