"""Find the first tensor at which two models part, by bisection over the tensors both name alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lamina.backends import get_backend
from lamina.backends.backend import Executable, Target
from lamina.backends.reference import compile_reference
from lamina.comparison.fingerprints import closest, fingerprints
from lamina.comparison.lineage import Lineage, exposed, observable
from lamina.comparison.verdict import Divergence
from lamina.errors import LaminaError
from lamina.ir.difference import Difference, difference, tolerance_of, unit
from lamina.ir.probe_inputs import Probe
from lamina.ir.program import Program

# Tensors read out in the first run; doubled every run, so that even a graph without depth takes O(log n).
_FIRST_BATCH = 8
_MOST_AGREEING = 8

Compile = Callable[[ir.Model], Executable]


def first_divergence(
    first: Program, second: Program, output: str, probe: Probe, tolerance: float | None, target: Target
) -> Divergence | None:
    """The first tensor ``output`` is computed from that differs beyond the tolerance on ``probe``.

    Searched with every runtime optimization off; where the models agree then, on the target itself. Tensors
    are held against each other by name; where the models share no inner names, by value.

    Returns:
        What was found, or None where the models cannot be observed.
    """
    compilers: list[Compile] = [compile_reference]
    if target.backend == "ort":
        compilers.append(lambda model: get_backend(target).compile(model, target))
    for compiler in compilers:
        search = _Search(first, second, probe, tolerance, compiler)
        try:
            if search.differ([output]):
                return search.run(output)
        except LaminaError:  # a runtime that will not show inner values: the output's figures still stand
            continue
    return None


class _Search:
    """One bisection: what is known to agree, what is known to differ."""

    def __init__(
        self, first: Program, second: Program, probe: Probe, tolerance: float | None, compiler: Compile
    ) -> None:
        self.programs = first, second
        self.lineages = Lineage(first), Lineage(second)
        self.probe, self.tolerance, self.compiler = probe, tolerance, compiler
        self.found: dict[str, Difference] = {}
        self.runs = 0

    def run(self, output: str) -> Divergence:
        """Bisect from ``output`` backwards; by value where names tell nothing."""
        lineage = self.lineages[0]
        worst, agreeing = self._by_name(output)
        if worst == output and not any(n in self.lineages[1].values for n in lineage.ancestors([output])):
            by_value = self._by_value(output)
            if by_value is not None:
                return by_value
        # What agrees and has nothing agreeing between itself and the divergence.
        before = agreeing & lineage.ancestors([worst])
        borders = lineage.ordered(before - lineage.ancestors(before))
        return self._report(worst, worst, self.found[worst], "name", borders)

    def differ(self, names: Sequence[str]) -> list[str]:
        """Run both models once and return those of ``names`` that differ, in their order."""
        arrays = [self._observe(side, names) for side in (0, 1)]
        self.runs += 1
        edge = self.probe.kind != "ordinary"
        differing = []
        for name in names:
            before, after = arrays[0][name], arrays[1][name]
            self.found[name] = found = difference(before, after, finite_only=edge)
            if _relative(found, before.dtype) > tolerance_of(before.dtype, self.tolerance):
                differing.append(name)
        return differing

    def _by_name(self, output: str) -> tuple[str, set[str]]:
        """The first differing tensor among those both models name alike, and all that were seen to agree."""
        lineage = self.lineages[0]
        worst, agreeing, step = output, set[str](), _FIRST_BATCH
        while True:
            candidates = self._candidates(worst, agreeing) or self._unseen_inputs(worst)
            if not candidates:
                return worst, agreeing
            chosen = _spread(candidates, step)
            differing = self.differ(chosen)
            # A tensor that agrees clears all it was computed from.
            agreeing |= set(chosen) - set(differing)
            if differing:
                worst = lineage.ordered(differing)[0]
            step *= 2

    def _candidates(self, worst: str, agreeing: Iterable[str]) -> list[str]:
        one, other = self.lineages
        cleared = one.ancestors(agreeing) | set(agreeing)
        return one.ordered(
            name
            for name in one.ancestors([worst]) - cleared
            if name in other.values and _alike(one.values[name], other.values[name])
        )

    def _unseen_inputs(self, worst: str) -> list[str]:
        """What ``worst`` is computed from and was cleared unseen: later values may hide a difference."""
        one, other = self.lineages
        return [
            n
            for n in one.inputs_of(worst)
            if n not in self.found and n in other.values and _alike(one.values[n], other.values[n])
        ]

    def _by_value(self, output: str) -> Divergence | None:
        """The first tensor that nothing in the second model equals, though its inputs are there."""
        one, other = self.lineages
        mine = [n for n in one.ordered(one.ancestors([output])) if observable(one.values[n])]
        theirs = [n for n in other.values if observable(other.values[n])]
        marks = [
            fingerprints(program, names, self._feeds(side), self.compiler)
            for side, (program, names) in enumerate(zip(self.programs, (mine, theirs), strict=True))
        ]
        self.runs += 1
        loose = 4 * tolerance_of(np.dtype(np.float32), self.tolerance)
        twins = {name: closest(mark, marks[1], loose) for name, mark in marks[0].items()}
        matched = {name for name, twin in twins.items() if twin.equal}
        unknown = set(mine) - matched - one.ancestors(matched)
        if not unknown:
            return None
        name = one.ordered(unknown)[0]
        other_name = twins[name].name if name in twins else None
        found = self.found[output]
        if other_name is not None:
            found = difference(self._observe(0, [name])[name], self._observe(1, [other_name])[other_name])
        borders = [n for n in one.inputs_of(name) if n in matched or n in one.ancestors(matched)]
        return self._report(name, other_name, found, "value", borders)

    def _observe(self, side: int, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        # Only what is asked for is an output, so nothing else is kept alive.
        executable = self.compiler(exposed(self.programs[side], names))
        return executable.run(self._feeds(side))

    def _feeds(self, side: int) -> dict[str, np.ndarray]:
        wanted = {p.name for p in self.programs[side].inputs}
        return {name: array for name, array in self.probe.feeds.items() if name in wanted}

    def _report(
        self, name: str, other_name: str | None, found: Difference, how: str, agrees: Sequence[str]
    ) -> Divergence:
        node, operator = _made_by(self.lineages[0], name)
        other_node, other_operator = _made_by(self.lineages[1], other_name)
        return Divergence(
            name=name,
            node=node or "",
            operator=operator or "",
            other_name=other_name,
            other_node=other_node,
            other_operator=other_operator,
            matched_by=how,
            max_abs=found.max_abs,
            max_rel=_relative(found, None),
            max_ulp=found.max_ulp,
            agrees=tuple(agrees)[-_MOST_AGREEING:],
            input=self.probe.label,
            runs=self.runs,
        )


def _relative(found: Difference, dtype: np.dtype[np.generic] | None) -> float:
    if found.max_abs == 0.0:
        return 0.0
    least = float(unit(0.0, dtype)) if dtype is not None and dtype.kind in "fV" else 0.0
    scale = max(found.scale, least)
    return found.max_abs / scale if scale else float("inf")


def _spread(names: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the names, evenly over all of them, the first and the last included."""
    if len(names) <= count:
        return list(names)
    return [names[i] for i in sorted({int(i) for i in np.linspace(0, len(names) - 1, count)})]


def _alike(one: ir.Value, other: ir.Value) -> bool:
    dtypes = one.dtype, other.dtype
    return observable(one) and observable(other) and (None in dtypes or dtypes[0] == dtypes[1])


def _made_by(lineage: Lineage, name: str | None) -> tuple[str | None, str | None]:
    node = lineage.values[name].producer() if name is not None and name in lineage.values else None
    if node is None:
        return None, None
    return node.name, f"{node.domain}.{node.op_type}" if node.domain else node.op_type
