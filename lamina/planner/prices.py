"""What every option costs on the target: measured once per distinct operator signature, kept on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lamina.backends.backend import Backend, Target, Workload
from lamina.backends.load import machine_load
from lamina.errors import BackendError, LaminaError
from lamina.ir.program import Program
from lamina.ir.shapes import observed_shapes
from lamina.passes.pass_ import Option, Site, Transform
from lamina.planner.price_bench import PriceBench, border_unit, capture
from lamina.planner.price_models import Extractor, Observed, Unit, emit_option
from lamina.planner.price_signature import describe, structure
from lamina.planner.price_store import PriceStore

FLOAT = "float"
Key = tuple[str, str, str, str]
Request = tuple[Site, Transform, Sequence[Option]]
Progress = Callable[[int, int], None]
BorderKind = Literal["quantize", "dequantize"]

_SMALLEST_BORDER = 8**3
_BORDER_STEP = 8
_SAVE_EVERY = 25


@dataclass(frozen=True)
class _Job:
    """One measurement to make: a signature and a site that has it."""

    signature: str
    site: Site
    transform: Transform
    option: Option | None
    case: str


class Prices:
    """The price table of one target.

    Args:
        target: Where; prices hold for its thread count and session options.
        backend: The target's backend; says what the device is.
        cache_dir: Folder of the table; the platform's cache folder (or ``LAMINA_CACHE``) when omitted.

    Attributes:
        failures: Why an option, or the float form of a site, has no price.

    Raises:
        BackendError: Operators can only be priced on ONNX Runtime.
    """

    def __init__(self, target: Target, backend: Backend, cache_dir: Path | None = None) -> None:
        if target.backend != "ort":
            raise BackendError(
                f"target '{target}': operators are priced on ONNX Runtime only",
                advice="plan for ort:cpu, then compile the result for the other backend",
            )
        known = backend.capabilities(target)
        identity = {
            "device": known["device"],
            "versions": dict(known["versions"]),
            "threads": target.threads,
            "options": dict(target.options),
        }
        self.target = target
        self.store = PriceStore(identity, cache_dir)
        self.failures: dict[Key, str] = {}

    def price(
        self,
        program: Program,
        sites: Sequence[Request],
        workload: Workload,
        *,
        progress: Progress | None = None,
    ) -> dict[Key, float]:
        """Seconds of every site as it is and in every option, per case.

        Static int8 options are priced without the conversions at their borders (see :meth:`border`);
        ``drop`` costs nothing by definition. An option the runtime refuses costs infinity; a site whose float
        form cannot be run on its own counts as free, its options as infinite; :attr:`failures` says why.

        Args:
            program: The program the sites belong to.
            sites: Site, its transform, the options asked for.
            workload: The cases.
            progress: Called with (measured, to measure).

        Returns:
            (transform name, site name, option name or ``float``, case name) -> seconds.

        Raises:
            BackendError: The program itself cannot be run on a case.
        """
        extractor = Extractor(program)
        signatures: dict[Key, str] = {}
        jobs: dict[str, _Job] = {}
        feeds = {case.name: case.feeds for case in workload}
        observed = {case.name: observed_shapes(program, case.feeds) for case in workload}
        for case in workload:
            for site, transform, options in sites:
                for key, job in self._jobs(extractor, site, transform, options, case.name, observed):
                    signatures[key] = job.signature
                    jobs.setdefault(job.signature, job)
        trust_busy = self._busy()
        todo = [job for job in jobs.values() if not self._known(job.signature, trust_busy)]
        refused = self._measure(extractor, todo, observed, feeds, progress) if todo else {}
        return self._table(sites, workload, signatures, refused)

    def border(self, shape: Sequence[int], kind: BorderKind, case: str = "") -> float:
        """Seconds of one conversion of a tensor between float32 and uint8, interpolated by element count.

        Tensors of rank 4 and up also change their layout where integer convolutions begin and end; that is
        included.

        Args:
            shape: The tensor's shape.
            kind: ``quantize`` or ``dequantize``.
            case: Name of the case; the shape already says what it needs to.
        """
        count = max(math.prod(int(d) for d in shape), 1)
        spatial = len(shape) >= 4
        upper = _SMALLEST_BORDER
        while upper < count:
            upper *= _BORDER_STEP
        if upper == _SMALLEST_BORDER:
            return self._border_point(upper, kind, spatial)
        low, high = (self._border_point(n, kind, spatial) for n in (upper // _BORDER_STEP, upper))
        share = (count - upper // _BORDER_STEP) / (upper - upper // _BORDER_STEP)
        return low + share * (high - low)

    # -- signatures ---------------------------------------------------------------------------------

    def _jobs(
        self,
        extractor: Extractor,
        site: Site,
        transform: Transform,
        options: Sequence[Option],
        case: str,
        observed: Mapping[str, Observed],
    ) -> list[tuple[Key, _Job]]:
        try:
            text = describe(extractor.extract(site, observed[case]).model.graph)
        except LaminaError as error:
            for name in (FLOAT, *(o.name for o in options)):
                self.failures[transform.name, site.name, name, case] = error.what
            return []
        jobs = [((transform.name, site.name, FLOAT, case), _Job(text, site, transform, None, case))]
        for option in options:
            if option.name == "drop":
                continue
            if option.name in transform.same_work:
                key = (transform.name, site.name, option.name, case)
                jobs.append((key, _Job(text, site, transform, None, case)))
                continue
            work = json.dumps(structure(option.parameters), sort_keys=True)
            forms = f"{option.input_form}->{option.output_form}"
            signature = f"{transform.name}/{option.name} {forms} {work} of {text}"
            key = (transform.name, site.name, option.name, case)
            jobs.append((key, _Job(signature, site, transform, option, case)))
        return jobs

    def _known(self, signature: str, trust_busy: bool) -> bool:
        price = self.store.get(signature)
        return price is not None and (price.quiet or trust_busy)

    @staticmethod
    def _busy() -> bool:
        """Whether the machine is too busy now to better a price that was taken on a busy machine."""
        return not machine_load().quiet

    # -- measuring ----------------------------------------------------------------------------------

    def _measure(
        self,
        extractor: Extractor,
        todo: Sequence[_Job],
        observed: Mapping[str, Observed],
        feeds: Mapping[str, Mapping[str, np.ndarray]],
        progress: Progress | None,
    ) -> dict[str, str]:
        """Measure jobs into the store; signature -> reason for those the runtime refuses."""
        refused: dict[str, str] = {}
        captured: dict[str, np.ndarray] = {}
        now = ""
        limit = _weight_bytes(extractor.program)
        try:
            with PriceBench(self.target, limit) as bench:
                for done, job in enumerate(todo):
                    if progress is not None:
                        progress(done, len(todo))
                    if job.case != now:
                        now = job.case
                        captured = self._captured(extractor, todo, now, observed, feeds)
                    try:
                        unit = self._unit(extractor, job, observed)
                        self.store.put(bench.measure(job.signature, unit, unit.feeds(captured)))
                    except LaminaError as error:
                        refused[job.signature] = str(error)
                    if done % _SAVE_EVERY == _SAVE_EVERY - 1:
                        self.store.save()
        finally:
            self.store.save()
        if progress is not None:
            progress(len(todo), len(todo))
        return refused

    @staticmethod
    def _unit(extractor: Extractor, job: _Job, observed: Mapping[str, Observed]) -> Unit:
        unit = extractor.extract(job.site, observed[job.case])
        if job.option is not None:
            extractor.lend(unit, job.option.borrows)
            emit_option(unit, job.site, job.transform, job.option)
        return unit

    @staticmethod
    def _captured(
        extractor: Extractor,
        todo: Sequence[_Job],
        case: str,
        observed: Mapping[str, Observed],
        feeds: Mapping[str, Mapping[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """What the sites of one case's jobs read when the program runs on its feeds."""
        wanted: dict[str, None] = {}
        jobs = [job for job in todo if job.case == case]
        # trap: sites of two transforms may have one name and not the same nodes
        for site in {(job.site.transform, job.site.name): job.site for job in jobs}.values():
            wanted.update(dict.fromkeys(extractor.extract(site, observed[case]).sources.values()))
        return capture(extractor.program, list(wanted), feeds[case])

    def _table(
        self,
        sites: Sequence[Request],
        workload: Workload,
        signatures: Mapping[Key, str],
        refused: Mapping[str, str],
    ) -> dict[Key, float]:
        table: dict[Key, float] = {}
        for site, transform, options in sites:
            for case in workload:
                for name in (FLOAT, *(o.name for o in options)):
                    key = (transform.name, site.name, name, case.name)
                    table[key] = self._value(key, signatures, refused)
        return table

    def _value(self, key: Key, signatures: Mapping[Key, str], refused: Mapping[str, str]) -> float:
        if key[2] == "drop":
            return 0.0
        without = (*key[:2], FLOAT, key[3])
        for needed in (without, key):
            signature = signatures.get(needed)
            if signature is None or self.store.get(signature) is None:
                reason = self.failures.get(needed) or refused.get(signature or "", "it was not measured")
                self.failures[key] = reason
                return 0.0 if key[2] == FLOAT else math.inf
        price = self.store.get(signatures[key])
        assert price is not None
        return price.seconds

    def _border_point(self, count: int, kind: BorderKind, spatial: bool) -> float:
        signature = _border_signature(count, kind, spatial)
        price = self.store.get(signature)
        if price is None:
            self._measure_borders(count, spatial)
            price = self.store.get(signature)
        assert price is not None
        return price.seconds

    def _measure_borders(self, largest: int, spatial: bool) -> None:
        """Measure every missing point up to ``largest``, both ways, in one worker."""
        with PriceBench(self.target, 0) as bench:
            count = _SMALLEST_BORDER
            while count <= largest:
                for kind in ("quantize", "dequantize"):
                    signature = _border_signature(count, kind, spatial)
                    if self.store.get(signature) is None:
                        unit, feeds = border_unit(count, kind, spatial)
                        self.store.put(bench.measure(signature, unit, feeds))
                count *= _BORDER_STEP
        self.store.save()


def _border_signature(count: int, kind: str, spatial: bool) -> str:
    return f"border {kind} of {count} elements{' with layout' if spatial else ''}"


def _weight_bytes(program: Program) -> int:
    values = program.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)
