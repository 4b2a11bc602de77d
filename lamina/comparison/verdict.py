"""What a comparison says, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class OutputDifference:
    """How one output differs, over all inputs both models ran on.

    Attributes:
        name: Output name.
        equal: Whether ``max_rel`` is within ``tolerance``; discrete outputs must be equal element by element.
        tolerance: What counts as equal for this output's dtype.
        max_abs: Largest absolute difference; infinite where shapes differ or only one side is finite.
        mean_abs: Mean absolute difference.
        max_rel: Largest over the inputs of the largest difference, divided by the first model's largest
            magnitude on that input, or on ordinary inputs where that is larger.
        mean_rel: ``mean_abs`` over the first model's largest magnitude on ordinary inputs.
        max_ulp: Largest difference in units in the last place of the first model's own elements; None for
            integers. It is large for elements near zero: ``scale_ulp`` is what rounding is judged by.
        mean_ulp: Mean of the same.
        scale_ulp: ``max_rel`` in units in the last place of that magnitude.
        worst_input: The input on which ``max_rel`` was seen, None where nothing differs.
        reason: What makes ``max_abs`` infinite, or None.
    """

    name: str
    equal: bool
    tolerance: float
    max_abs: float
    mean_abs: float
    max_rel: float
    mean_rel: float
    max_ulp: float | None
    mean_ulp: float | None
    scale_ulp: float | None
    worst_input: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Divergence:
    """The first tensor, in the first model's order of computation, at which the models part.

    Attributes:
        name: The tensor in the first model.
        node: The node that computes it there.
        operator: That node's operator.
        other_name: The tensor of the second model it was held against.
        other_node: The node that computes that.
        other_operator: That node's operator.
        matched_by: ``name``, or ``value`` where the models share no inner names: then nothing in the second
            model equals this tensor, though what it is computed from is there.
        max_abs: Largest absolute difference on ``input``.
        max_rel: The same over the largest magnitude of the first model's tensor.
        max_ulp: The same in units in the last place of its elements; None for integers.
        agrees: Tensors right before it that agree.
        input: The input on which the models were run.
        runs: How many times both were run to find it.
    """

    name: str
    node: str
    operator: str
    other_name: str | None
    other_node: str | None
    other_operator: str | None
    matched_by: str
    max_abs: float
    max_rel: float
    max_ulp: float | None
    agrees: tuple[str, ...]
    input: str
    runs: int


@dataclass(frozen=True)
class Structure:
    """How the models differ as graphs.

    Attributes:
        interface: Differences of inputs and outputs (missing, added, reordered, other dtype or rank). Any of
            them makes models unequal.
        shapes: Declared dims that differ; what counts is whether both run.
        opsets: Domain -> the two versions, where they differ (None: not imported).
        operators: Operator -> how many each has, where that differs.
        nodes: Nodes of each, subgraphs included.
        initializers: Weights of each.
        initializer_bytes: Their bytes.
        random: Nodes that draw random numbers: outputs then differ from run to run.
    """

    interface: tuple[str, ...]
    shapes: tuple[str, ...]
    opsets: Mapping[str, tuple[int | None, int | None]]
    operators: Mapping[str, tuple[int, int]]
    nodes: tuple[int, int]
    initializers: tuple[int, int]
    initializer_bytes: tuple[int, int]
    random: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The verdict.

    Attributes:
        equal: Whether the interfaces are the same and every output agrees on every input.
        tolerance: Relative to an output's largest magnitude; see :attr:`OutputDifference.tolerance`.
        samples: Inputs compared: generated ones, and rows of given data.
        skipped: Inputs left out because the first model does not run on them.
        ill_conditioned: Edge inputs left out because the first model's own output moves as much when the
            input is rounded differently.
        failures: Inputs on which only the second model fails, with the reason.
        outputs: One entry an output that both have.
        first_divergence: Where the models part, or None.
        structure: How they differ as graphs.
    """

    equal: bool
    tolerance: float
    samples: int
    skipped: int
    ill_conditioned: int
    failures: tuple[str, ...]
    outputs: tuple[OutputDifference, ...]
    first_divergence: Divergence | None
    structure: Structure

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``--json`` prints it."""
        return asdict(self)
