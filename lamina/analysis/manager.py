"""Analyses computed once: cached by function, options and the program's fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from lamina.analysis.needs import FORWARD, Looks, Need, Needy, union
from lamina.analysis.residual import BranchProbe
from lamina.analysis.statistics import Statistics, collect
from lamina.analysis.store import data_hash, load_statistics, save_statistics
from lamina.data import Dataset
from lamina.ir.program import Program

P = ParamSpec("P")
R = TypeVar("R")
_Key = tuple[str, Callable[..., Any], Any]


class Analyses:
    """Results of analyses of one program, each computed when first asked for.

    An analysis is any function whose first argument is the program. Results are shared and must not be
    changed. Options that can be hashed are compared by value, others (data sets, feeds) by identity, and are
    kept alive with the result.

    Args:
        program: The program to analyze.
        folder: Where collected statistics are kept from one process to the next; None: nowhere.
    """

    def __init__(self, program: Program, folder: Path | None = None) -> None:
        self.program = program
        self.folder = folder
        self._results: dict[_Key, tuple[Any, Any]] = {}
        self._collected: dict[str, tuple[frozenset[Need], Statistics]] = {}

    def statistics(
        self,
        metrics: Iterable[Needy],
        phases: Dataset | Mapping[str, Dataset],
        branches: Sequence[BranchProbe] = (),
        *,
        looks: Looks | None = None,
        mask: str | None = None,
        threads: int | None = None,
    ) -> dict[str, Statistics]:
        """What all the metrics need, collected in one run a phase; earlier runs are used where they suffice.

        A run is kept by the program's fingerprint and a hash of the data's contents; one that collected more
        than is needed now is used too.

        Args:
            metrics: Whatever says its needs; their union is collected.
            phases: A data set, or several by phase name (prefill, decode).
            branches: Residual branches.
            looks: How much of the data the costly statistics look at.
            mask: As for :func:`lamina.analysis.statistics.collect`.
            threads: Threads of a run.

        Returns:
            Statistics by phase; a single data set is the phase ``data``.

        Raises:
            DataError: As :func:`lamina.analysis.statistics.collect`.
            BackendError: As :func:`lamina.analysis.statistics.collect`.
            OutputError: The folder cannot be written.
        """
        needs, look = union(metrics) & FORWARD, looks or Looks()
        named = {"data": phases} if isinstance(phases, Dataset) else phases
        found = {}
        for phase, dataset in named.items():
            parts = (self.program.fingerprint, data_hash(dataset), repr((tuple(branches), look, mask)))
            key = hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]
            known = self._known(key, needs)
            if known is None:
                known = collect(
                    self.program,
                    dataset,
                    branches=branches,
                    needs=needs,
                    looks=look,
                    mask=mask,
                    threads=threads,
                )
                self._collected[key] = (needs, known)
                if self.folder is not None:
                    save_statistics(known, self._file(key, needs))
            found[phase] = known
        return found

    def _known(self, key: str, needs: frozenset[Need]) -> Statistics | None:
        kept = self._collected.get(key)
        if kept is not None and needs <= kept[0]:
            return kept[1]
        if self.folder is None or not self.folder.is_dir():
            return None
        for path in sorted(self.folder.glob(f"{key}.*.npz")):
            there = frozenset(n for n in Need if n.value in path.name.split(".")[1].split("-"))
            read = load_statistics(path) if needs <= there else None
            if read is not None:
                self._collected[key] = (there, read)
                return read
        return None

    def _file(self, key: str, needs: frozenset[Need]) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.{'-'.join(sorted(n.value for n in needs))}.npz"

    def get(self, function: Callable[Concatenate[Program, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of ``function(program, *args, **kwargs)``, from the cache where it is there."""
        options = (tuple(map(_token, args)), tuple(sorted((k, _token(v)) for k, v in kwargs.items())))
        key = (self.program.fingerprint, function, options)
        if key not in self._results:
            self._results[key] = (function(self.program, *args, **kwargs), (args, kwargs))
        result: R = self._results[key][0]
        return result

    def preserve(self, program: Program, functions: Collection[Callable[..., Any]] = ()) -> Analyses:
        """Analyses of a changed program, with the results of ``functions`` carried over.

        A program that computes the same (equal fingerprint) keeps everything.

        Args:
            program: What a pass made of this program.
            functions: Analyses the pass says are still true.
        """
        following = Analyses(program, self.folder)
        if program.fingerprint == self.program.fingerprint:
            following._collected.update(self._collected)
        for (fingerprint, function, options), result in self._results.items():
            if fingerprint == program.fingerprint or function in functions:
                following._results[(program.fingerprint, function, options)] = result
        return following

    def __len__(self) -> int:
        return len(self._results)


def _token(option: Any) -> Any:
    """What an option is compared by: type and value, so that 1, 1.0 and True differ; else identity."""
    if isinstance(option, tuple):
        return type(option).__name__, tuple(_token(o) for o in option)
    if isinstance(option, frozenset):
        return type(option).__name__, frozenset(_token(o) for o in option)
    try:
        hash(option)
    except TypeError:
        return "identity", id(option)
    return type(option).__name__, option
