"""The pass protocol: folds are exact, transforms offer moves; both only ever change a clone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from lamina.data import Dataset
from lamina.ir.names import every_node
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter


@dataclass(frozen=True)
class Exact:
    """Bit equal outputs."""


@dataclass(frozen=True)
class Rounding:
    """Reassociated arithmetic: at most ``ulps`` of max|y|."""

    ulps: float


@dataclass(frozen=True)
class Lossy:
    """Changes the function; the damage is measured, never assumed."""


Effect = Exact | Rounding | Lossy
Need = Literal["ranges", "inputs", "vectors", "branches", "matches", "channels"]
Form = Literal["float", "int8"]


@dataclass(frozen=True)
class Site:
    """A place where a transform applies. Names, not objects, so that it survives cloning.

    Attributes:
        transform: Name of the transform.
        name: Unique over all sites of a program for that transform; readable (module path where known).
        kind: What it is: ``attention``, ``mlp``, ``conv``, ``matmul``, ``gemm``, ``add``, ...
        nodes: Names of the nodes an option replaces. Sites of different transforms may nest,
            never overlap partly.
        inputs: Names of the activations read (weights excluded), in the order of use.
        outputs: Names of the values the nodes give to the rest of the graph; an option re-emits each.
        weights: Names of the initializers that belong to the site.
    """

    transform: str
    name: str
    kind: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """A place that nearly matched, with the reason it was left alone."""

    transform: str
    where: str
    reason: str


@dataclass(frozen=True)
class Option:
    """One way a transform can change a site.

    Attributes:
        name: ``drop``, ``w8a8-static``, ``w8a8-dynamic``, ``w8``, ``w4``, ``float16``, ...
        parameters: Everything ``emit`` needs beyond the graph itself; JSON values only, so a plan carries it.
        input_form: What the emitted nodes read at the site's borders: ``int8`` when a neighbour that emits
            the same quantized tensor spares the conversion.
        output_form: Likewise for what they write.
        borrows: Names of initializers of other sites that the emitted nodes read: they stay in the file for
            them, whatever becomes of those sites.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    input_form: Form = "float"
    output_form: Form = "float"
    borrows: tuple[str, ...] = ()


def pass_name(cls: type) -> str:
    """``FuseGelu`` -> ``fuse-gelu``: the one place a class name becomes a report name."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()


class Fold:
    """An exact rewrite of a whole program. Subclass as a frozen dataclass; fields are options."""

    effect: ClassVar[Effect] = Exact()
    paper: ClassVar[str] = ""
    minimum_opset: ClassVar[int] = 13
    # Operators of which one must be in the model, subgraphs included, for there to be anything to do; empty:
    # that cannot be told from the operators.
    wants: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """Report name, derived from the class name."""
        return pass_name(type(self))

    def idle(self, model: ir.Model) -> bool:
        """Whether it is certain, at little cost, that :meth:`apply` would change nothing."""
        return bool(self.wants) and not any(n.op_type in self.wants for n in every_node(model.graph))

    def apply(self, rewriter: Rewriter) -> None:
        """Change the model under ``rewriter``, recording each change with ``rewriter.record``."""
        raise NotImplementedError


class Transform:
    """A lossy pass that offers moves. Subclass as a frozen dataclass; fields are options."""

    effect: ClassVar[Effect] = Lossy()
    paper: ClassVar[str] = ""
    axes: ClassVar[tuple[str, ...]] = ("latency", "size")
    needs: ClassVar[frozenset[Need]] = frozenset()
    name: ClassVar[str] = ""
    minimum_opset: ClassVar[int] = 13
    # Options that change how weights are kept in the file and nothing at run time: they never gain latency.
    storage_only: ClassVar[frozenset[str]] = frozenset()
    # Options that run the site's own operators on other weights of their shapes: by definition as fast as it.
    same_work: ClassVar[frozenset[str]] = frozenset()
    # Whether every option takes the site's nodes out, so that no other move inside it means anything.
    removes_site: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Site | Refusal]:
        """Every site of ``program``; reads only."""
        raise NotImplementedError

    def sum_after(self, site: Site, names: Collection[str]) -> str | None:
        """The value that stands where the site's one output was, a sum of residual branches.

        Args:
            site: A site of one output whose option was taken.
            names: Values of the changed program.

        Returns:
            Its name; None where the output is no such sum, or is there itself.
        """
        return None

    def collect(self, program: Program, dataset: Dataset, statistics: Any) -> Any:
        """The statistics with what the options need beyond ranges, from calibration samples."""
        return statistics

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        """The options of one site on ``target``; ``statistics`` is what the calibration run collected."""
        raise NotImplementedError

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        """Build the option's nodes through ``rewriter`` and return one value per ``site.outputs``.

        ``nodes`` maps the names in ``site.nodes`` to the nodes as they are now: read inputs and weights from
        them (another move may have rewired their inputs), never change them. The same code serves the
        rewritten program, the supergraph (``rewriter`` then fills a subgraph) and the price micro-models.
        """
        raise NotImplementedError
