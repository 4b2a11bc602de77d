"""Measured damage of rounding the weights of one operator by itself, width by width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lamina.analysis.gradient_operators import weighted_operators
from lamina.analysis.single_site import LEAST_BYTES, Damage, damages
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.measured import rounded
from lamina.quality.metric import Metric

_Site = tuple[str, int]
# Changed programs prepared together: none runs before all of them are, and a wait needs an estimate. The
# original runs once more for each such group, which is an eighth of what the group itself takes.
_AT_A_TIME = 16


def bit_damages(
    program: Program,
    dataset: Dataset,
    metric: Metric,
    bits: Sequence[int] = (8, 4),
    *,
    threads: int | None = None,
    most_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[int, Damage]]:
    """Divergence of the outputs when one operator's weights are rounded; only what follows it is run.

    Rounding is symmetric with one scale an output channel (:func:`lamina.passes.measured.rounded`), kept in
    floating point: what the width costs in quality. Operators that share a weight change together.

    Args:
        program: The original.
        dataset: Samples.
        metric: A divergence.
        bits: Widths, each at least 2.
        threads: Threads of a run.
        most_bytes: Rounded weights held at a time; None: twice the model's, at least 256 MB. The original is
            run again for each group of changed programs.
        progress: Called with runs of changed programs done and in all.

    Returns:
        Operator -> width -> damage, in graph order.

    Raises:
        DataError: The data does not fit.
        BackendError: ONNX Runtime refuses a program.
    """
    sizes = _weight_bytes(program)
    most = most_bytes or max(LEAST_BYTES, 2 * sum(sizes.values()))
    parts = list(_parts(sizes, bits, most))
    found: dict[str, dict[int, Damage]] = {name: {} for name in sizes}
    before, count = 0, sum(len(part) for part in parts)
    for part in parts:
        variants = {f"{name} w{width}": rounded(program, width, {name}) for name, width in part}
        tell = _shifted(progress, before, len(part), count)
        measured = damages(
            program, variants, dataset, metric, threads=threads, most_bytes=most_bytes, progress=tell
        )
        for name, width in part:
            found[name][width] = measured[f"{name} w{width}"]
        before += len(part)
    return found


def _weight_bytes(program: Program) -> dict[str, int]:
    """Operator -> bytes of the weights that are rounded."""
    sizes: dict[str, int] = {}
    for operator in weighted_operators(program):
        tensor = program.graph.initializers[operator.weight].const_value
        assert tensor is not None
        sizes[operator.name] = sizes.get(operator.name, 0) + tensor.nbytes
    return sizes


def _parts(sizes: dict[str, int], bits: Sequence[int], most: int) -> Iterator[list[_Site]]:
    """Sites in order, in groups whose rounded weights fit ``most`` bytes; at least one site a group."""
    part: list[_Site] = []
    held = 0
    for name, size in sizes.items():
        for width in bits:
            if part and (held + size > most or len(part) == _AT_A_TIME):
                yield part
                part, held = [], 0
            part.append((name, width))
            held += size
    if part:
        yield part


def _shifted(
    progress: Callable[[int, int], None] | None, before: int, here: int, count: int
) -> Callable[[int, int], None] | None:
    """Progress of one part as progress of all: each site is run as often as any other."""
    if progress is None:
        return None

    def tell(done: int, total: int) -> None:
        runs = total // here
        progress(before * runs + done, count * runs)

    return tell
