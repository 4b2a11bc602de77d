"""Run a program piece by piece over the same batches: each piece starts where the last one ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.analysis.instrument import InstrumentedSession
from lamina.analysis.suffix import activation_reads, open_after
from lamina.ir.program import Program


@dataclass(frozen=True)
class Rest:
    """The rest of a stream, compiled once; weights that were left free are given to each run."""

    session: InstrumentedSession | None
    reads: Mapping[str, str]
    makes: Sequence[str]
    wanted: Sequence[str]
    free: Sequence[str]
    held: Sequence[Mapping[str, np.ndarray]]

    def run(self, number: int, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The wanted values of one batch."""
        have = dict(self.held[number])
        if self.session is not None:
            given = {label: have[name] for label, name in self.reads.items()}
            given.update({name: weights[name] for name in self.free})
            made = self.session.run(list(self.makes), given, where=f"batch {number}")
            have.update(zip(self.makes, made, strict=True))
        return {name: have[name] for name in self.wanted}


class Stream:
    """What a program computes on some batches, as far as it has been run.

    Visiting n operators one after another costs about one run of the program, not n halves. Held are the
    values that what is still to be run reads: for a residual network one stream of each batch, for all
    batches at a time.

    Args:
        feeds: Model inputs of each batch.
        threads: Threads of a run; all available cores when None.
    """

    def __init__(self, feeds: Sequence[Mapping[str, np.ndarray]], *, threads: int | None = None) -> None:
        self._feeds = feeds
        self._kept: list[dict[str, np.ndarray]] = [{} for _ in feeds]
        self._threads = threads

    def rest(
        self,
        program: Program,
        wanted: Sequence[str],
        loosen: Callable[[Program], Sequence[str]] | None = None,
    ) -> Rest:
        """What runs from where the stream is to ``wanted``; the stream stays.

        Args:
            program: The program, changed at will behind what was settled in the last :meth:`run`.
            wanted: Names of values.
            loosen: Given a copy of what is left to run, may change it, and names the initializers of it that
                each run is given.

        Raises:
            BackendError: ONNX Runtime refuses the rest.
        """
        known = set(self._feeds[0]) | set(self._kept[0])
        make = [name for name in dict.fromkeys(wanted) if name not in known]
        piece, reads = open_after(program, known, make)
        free = loosen(piece) if loosen is not None else ()
        for name in free:
            value = piece.graph.initializers.pop(name)
            value.const_value = None
            piece.graph.inputs.append(value)
        session = InstrumentedSession(piece, threads=self._threads, own=True) if make else None
        held = [{**feeds, **kept} for feeds, kept in zip(self._feeds, self._kept, strict=True)]
        return Rest(session, reads, make, list(wanted), list(free), held)

    def run(
        self, program: Program, wanted: Collection[str], settled: Collection[str]
    ) -> Iterator[dict[str, np.ndarray]]:
        """``wanted`` values of each batch, in order; take them all before the next call.

        Args:
            program: The program; from one call to the next only nodes behind ``settled`` may change.
            wanted: Names of values, inputs included.
            settled: Names of values that are final, with everything they are made from.

        Raises:
            BackendError: ONNX Runtime refuses a piece.
        """
        keep = _frontier(program.graph, settled)
        known = {name for kept in self._kept[:1] for name in kept} | set(self._feeds[0])
        make = [name for name in dict.fromkeys((*wanted, *keep)) if name not in known]
        piece, reads = open_after(program, known, make)
        made = [v.name or "" for v in piece.graph.outputs]
        session = InstrumentedSession(piece, threads=self._threads, own=True) if made else None
        for number, (feeds, kept) in enumerate(zip(self._feeds, self._kept, strict=True)):
            have = {**feeds, **kept}
            given = {label: have[name] for label, name in reads.items()}
            if session is not None:
                outputs = session.run(made, given, where=f"batch {number}")
                have.update(zip(made, outputs, strict=True))
            self._kept[number] = {name: have[name] for name in keep if name in have}
            yield {name: have[name] for name in wanted}


def _frontier(graph: ir.Graph, settled: Collection[str]) -> list[str]:
    """Values among ``settled`` and what they are made from that anything else reads."""
    reads = activation_reads(graph)
    makers = {v.name or "": n for n in graph for v in n.outputs}
    pending = [makers[name] for name in settled if name in makers]
    inside = set(pending)
    while pending:
        for value in reads[pending.pop()]:
            maker = value.producer()
            if maker is not None and maker in reads and maker not in inside:
                inside.add(maker)
                pending.append(maker)
    found: dict[str, None] = {}
    for node, values in reads.items():
        if node not in inside:
            found.update(dict.fromkeys(v.name or "" for v in values if v.producer() in inside))
    found.update(dict.fromkeys(v.name or "" for v in graph.outputs if v.producer() in inside))
    return list(found)
