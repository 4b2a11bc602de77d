"""The transform: which forms each weighted operator can take, and the code that writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.analysis.ranges import RANGE_METHODS
from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Effect, Form, Lossy, Need, Option, Refusal, Site, Transform
from lamina.passes.quantize import carriers, dynamic, float8, float16, static, w4a8, weight_only
from lamina.passes.quantize.activations import activation_range, shares_mean
from lamina.passes.quantize.bias_correction import bias_shift
from lamina.passes.quantize.graph import FLOAT
from lamina.passes.quantize.places import is_left, nodes_of, placed, stored_block, takes_blocks, weights_of
from lamina.passes.quantize.rounding import METHODS, round_alone
from lamina.passes.quantize.sites import CARRIERS, NAME, find_sites
from lamina.passes.quantize.smoothing import RULES, Rule, Smoothing, check_rules, choose_smoothing
from lamina.passes.quantize.weights import CLIPPINGS, Clipping

FORMS = (
    "w8a8-static",
    "w8a8-dynamic",
    "w8",
    "w4",
    "w2",
    "stored-w8",
    "stored-w4",
    "stored-w3",
    "stored-w2",
    "float16",
    "bfloat16",
    "float16-compute",
)
# Offered when named only: w4a8 is slower than w4, with more error, wherever measured; 8-bit floats err more
# than integers of their size on weights as they usually are (docs/precision.md).
_FLOATS8 = ("stored-f8", "stored-mxf8")
NAMED_FORMS = (w4a8.NAME, *_FLOATS8)
_LINEAR = ("matmul", "gemm")
_BLOCKS = ("w8", "w4", "w2")
_STORED = ("conv", "convtranspose", "recurrent", "embedding", *_LINEAR)
Emitter = Callable[[Site, Option, Rewriter, Mapping[str, ir.Node]], ir.Value]

# (site kind, option name) -> what writes it
_EMITTERS: dict[tuple[str, str], Emitter] = {
    ("conv", "w8a8-static"): static.emit_conv,
    ("conv", "w8a8-dynamic"): dynamic.emit_conv,
    **{(kind, "w8a8-static"): static.emit_linear for kind in _LINEAR},
    **{(kind, "w8a8-dynamic"): dynamic.emit_linear for kind in _LINEAR},
    **{(kind, name): weight_only.emit_blocks for kind in _LINEAR for name in _BLOCKS},
    **{(kind, w4a8.NAME): w4a8.emit_w4a8 for kind in _LINEAR},
    **{(kind, "stored-w8"): weight_only.emit_stored for kind in _STORED},
    **{
        (kind, f"stored-w{bits}"): weight_only.emit_stored
        for kind in ("conv", "convtranspose", *_LINEAR)
        for bits in (4, 3, 2)
    },
    ("embedding", "stored-w4"): weight_only.emit_stored,
    **{(kind, name): float16.emit_stored for kind in _STORED for name in ("float16", "bfloat16")},
    **{(kind, "stored-f8"): float8.emit_stored for kind in _STORED if kind != "embedding"},
    **{(kind, "stored-mxf8"): float8.emit_stored for kind in ("conv", "convtranspose", *_LINEAR)},
    ("product", "w8a8-static"): static.emit_product,
    ("product", "w8a8-dynamic"): dynamic.emit_product,
    **{(kind, "float16-compute"): float16.emit_compute for kind in ("conv", *_LINEAR)},
    **{(kind, "w8a8-static"): carriers.emit_carrier for kind in CARRIERS},
}


@dataclass(frozen=True)
class Quantize(Transform):
    """Compute or store weighted operators in fewer bits, one choice an operator.

    Options, where they apply and the target has kernels: ``w8a8-static`` (uint8 activations by calibrated
    ranges, int8 weights a scale a channel), ``w8a8-dynamic`` (activation ranges at run time), ``w8``,
    ``w4`` and ``w2`` (weights in blocks, fused kernels), ``stored-w8`` to ``stored-w2`` and ``float16``
    (weights small in the file, widened at load, no run time), ``float16-compute``; by name ``w4a8``. Carriers
    (Add, pooling, mean, Concat, Pad) offer ``w8a8-static`` only: alone they cost, between quantized
    convolutions they spare two conversions. ConvTranspose, LSTM, GRU and RNN are stored small only.

    Fires: Conv with the Relu or Clip behind it, Gemm, MatMul with a constant matrix on either side and the
    bias Add behind it, Gather from a constant float table, ConvTranspose, LSTM, GRU and RNN; on request
    MatMul of two activations.
    Refuses: weights that are not constant float32, can be replaced by a caller, or lie in a subgraph; Gemm
    with transA or a bias that is not a vector; too short a reduction.
    Effect: Lossy. Rounding errors of at most half a scale an element, and clipping where that costs less.
    Cost: O(nodes) to find; a least-squares search of the weights, once a process, to write.
    Source: Jacob et al. 2018, arXiv:1712.05877 (integer arithmetic). Deviates: clipping is searched.

    Attributes:
        forms: Options to offer, out of :data:`FORMS` (the default) and :data:`NAMED_FORMS`.
        ranges: How activation ranges are chosen: ``mse``, ``percentile``, ``minmax`` or ``entropy``.
        clipping: How weight ranges are chosen: ``mse`` or ``minmax``.
        smoothing: Rules that scales between an activation's channels and its weights are chosen from: alphas
            of SmoothQuant and ``log``; the one with the least output error is taken where it pays. Needs
            calibration vectors (``statistics.inputs``); empty: none.
        correct_bias: Take the mean error of an operator's output, on calibration vectors, out of its bias.
        block: Elements that share a scale in the block forms: a power of two, 16 to 256.
        reduce_range: Use 7 bits of int8 weights. On x86 without VNNI the uint8 x int8 product saturates a
            16-bit sum, which is silently wrong with large weights; 7 bits cannot saturate. None: where the
            target's kernels were seen to saturate; without a target, where ONNX Runtime's here do.
        dynamic_conv: Offer ``w8a8-dynamic`` for Conv (ConvInteger: 6 to 9 times slower where measured).
        products: Offer ``w8a8-static`` and ``w8a8-dynamic`` for MatMul of two activations, as in attention.
        carriers: Offer the operators that carry int8 between convolutions.
        minimum_reduction: Fewest products an output sums for an operator to be worth it.
        rounding: How integer codes are chosen where the statistics hold second moments of what an operator
            reads (the need ``INPUTS``) and nothing is smoothed: ``nearest``, ``gptq`` or ``descent``.
            ``higgs`` needs no data: stored forms of 4 to 2 bits are rotated and rounded to the best grid for
            a Gaussian. A finished plan is rounded anew, operator after operator, whatever this says
            (:mod:`lamina.passes.quantize.rounding`), but for what is rotated.
    """

    forms: tuple[str, ...] = FORMS
    ranges: str = "mse"
    clipping: Clipping = "mse"
    smoothing: tuple[Rule, ...] = RULES
    correct_bias: bool = True
    block: int = 32
    reduce_range: bool | None = None
    dynamic_conv: bool = False
    products: bool = False
    carriers: bool = True
    minimum_reduction: int = 4
    rounding: str = "nearest"

    effect: ClassVar[Effect] = Lossy()
    paper: ClassVar[str] = "arXiv:1712.05877"
    axes: ClassVar[tuple[str, ...]] = ("latency", "size", "memory")
    needs: ClassVar[frozenset[Need]] = frozenset({"ranges", "vectors"})
    name: ClassVar[str] = NAME
    storage_only: ClassVar[frozenset[str]] = frozenset(
        {"stored-w8", "stored-w4", "stored-w3", "stored-w2", "float16", "bfloat16", *_FLOATS8}
    )

    def __post_init__(self) -> None:
        unknown = [form for form in self.forms if form not in (*FORMS, *NAMED_FORMS)]
        if unknown:
            names = ", ".join((*FORMS, *NAMED_FORMS))
            raise PassError(f"quantize has no form '{unknown[0]}'", advice=f"choose from: {names}")
        if self.ranges not in RANGE_METHODS:
            raise PassError(
                f"range method '{self.ranges}' is unknown", advice=f"choose one of {RANGE_METHODS}"
            )
        if self.clipping not in CLIPPINGS:
            raise PassError(
                f"weight clipping '{self.clipping}' is unknown", advice=f"choose one of {CLIPPINGS}"
            )
        if self.rounding not in (*METHODS, "higgs"):
            names = f"choose one of {(*METHODS, 'higgs')}"
            raise PassError(f"rounding '{self.rounding}' is unknown", advice=names)
        check_rules(self.smoothing)
        if self.block not in (16, 32, 64, 128, 256):
            raise PassError(f"block={self.block} is not possible", advice="choose 16, 32, 64, 128 or 256")

    def sites(self, program: Program) -> Iterator[Site | Refusal]:
        """Every weighted operator, embedding and carrier, or why not."""
        for found in find_sites(program, self.minimum_reduction):
            kind = "" if isinstance(found, Refusal) else found.kind
            if (self.carriers or kind not in CARRIERS) and (self.products or kind != "product"):
                yield found

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        """The forms of one site; static ones need ranges, float16 arithmetic needs kernels.

        Args:
            site: One of :meth:`sites` of ``program``.
            program: The original.
            statistics: Its ``ranges`` holds the distributions of values by name; None gives no static form.
            target: A target, its text, or None for every form that any target has.
        """
        kernels = _capabilities(target)
        found = []
        for form in self.forms:
            if (site.kind, form) not in _EMITTERS or not self._offered(form, site, kernels):
                continue
            option = self._option(form, site, program, statistics, self._weight_bits(form, target))
            if option is not None:
                found.append(placed(self._rounded(option, site, program, statistics), site, program))
        return tuple(found)

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        """Write the option's nodes; one value, in the type and shape of the site's output.

        Raises:
            PassError: The site has no such option, or the program's opset is too old for it.
        """
        emitter = _EMITTERS.get((site.kind, option.name))
        if emitter is None:
            raise PassError(
                f"'{site.name}' ({site.kind}) has no option '{option.name}'",
                where=f"{NAME} {option.name}",
                advice="the plan belongs to another version of lamina",
            )
        value = emitter(site, option, rewriter, nodes)
        old = nodes[site.nodes[-1]].outputs[0]
        value.dtype, value.shape = FLOAT, None if old.shape is None else ir.Shape(old.shape)
        if site.kind != "recurrent":
            return [value]
        made, given = value.producer(), nodes[site.nodes[0]].outputs
        assert made is not None
        for new, known in zip(made.outputs, given, strict=True):
            new.dtype, new.shape = FLOAT, known.shape
        # trap: not by name, for what the interface hands out may have been given another
        return [made.outputs[place] for place in option.parameters["outputs"]]

    def _offered(self, form: str, site: Site, kernels: Mapping[str, Any] | None) -> bool:
        if form == "w8a8-dynamic" and site.kind == "conv" and not self.dynamic_conv:
            return False
        if form == "float16-compute":
            halves = (kernels or {}).get("float16_kernels") or ()
            return _OPERATORS.get(site.kind, "") in halves
        if kernels is None:
            return True
        if form.startswith("stored") or form == "float16":
            return form not in kernels.get("refused", ())
        kernel = "w4" if form == w4a8.NAME else form
        return kernel in kernels.get("forms", {kernel: ()})

    def _weight_bits(self, form: str, target: Any) -> int:
        """Bits of weights that meet 8-bit activations in one product."""
        if not form.startswith("w8a8"):
            return 8
        reduce = self.reduce_range
        if reduce is None:
            kernels = _capabilities("ort:cpu" if target is None else target) or {}
            reduce = bool(kernels.get("saturates"))
        return 7 if reduce else 8

    def _option(self, form: str, site: Site, program: Program, statistics: Any, bits: int) -> Option | None:
        if form == "w8a8-static":
            return self._static(site, program, statistics, bits)
        if form in ("float16", "bfloat16", "float16-compute"):
            return self._half(form, site, program, statistics)
        if form in float8.OPSETS:
            return self._float8(form, site, program)
        if form == "stored-w8":
            return Option(form, self._channels(bits, site, program, statistics))
        if form == "w8a8-dynamic":
            if site.kind == "product":
                return Option(form)
            given = self._channels(bits, site, program, statistics)
            if (found := self._smoothing(site, program, statistics, bits, None)) is not None:
                given["smooth"] = found.parameters()
            return Option(form, self._corrected(given, site, program, statistics))
        width = 4 if form == w4a8.NAME else int(form[-1])
        parameters: dict[str, Any] = {"weight_bits": width, "clipping": self.clipping}
        if form in _BLOCKS or form == w4a8.NAME:
            if not takes_blocks(site, program, width):
                return None
            if form == w4a8.NAME:
                parameters |= w4a8.activation_parameters(site, program, statistics, self.ranges)
            return Option(form, {**parameters, "block": self.block, "opset": 25 if width == 2 else 21})
        block = stored_block(site, program, self.block)
        if block is None:
            return None
        # a zero point a block is an eighth of a bit: four bits gain more by it, fewer lose a level
        grid = "affine" if width == 4 and site.kind != "embedding" else "offset"
        if self.rounding == "higgs" and site.kind != "embedding":
            # the rotation needs a power of two
            turned = block & -block
            block, grid = (turned, "higgs") if turned >= 8 else (block, grid)
        return Option(form, {**parameters, "block": block, "grid": grid, "opset": _STORED_OPSET[width]})

    def _rounded(self, option: Option, site: Site, program: Program, statistics: Any) -> Option:
        seen = (getattr(statistics, "inputs", None) or {}).get(site.nodes[0])
        if self.rounding not in METHODS[1:] or "weight_bits" not in option.parameters:
            return option
        if seen is None or not seen.moments.size or "smooth" in option.parameters:
            return option
        named = replace(option, parameters={**option.parameters, "rounding": self.rounding})
        operator = statistics.operators[site.nodes[0]]
        # who shares a weight shares its codes
        readers = [
            statistics.inputs[name].moments
            for name, other in statistics.operators.items()
            if name in statistics.inputs
            and (other.weight, other.flipped, other.group)
            == (operator.weight, operator.flipped, operator.group)
        ]
        return round_alone(named, operator, program, np.sum(readers, axis=0))

    def _half(self, form: str, site: Site, program: Program, statistics: Any) -> Option | None:
        """float16 keeps more digits; bfloat16 is for weights that leave its range."""
        fits = all(float16.fits_float16(array) for array in weights_of(site, program))
        if form == "bfloat16":
            return None if fits and "float16" in self.forms else Option(form)
        if form == "float16-compute":
            fits = fits and float16.stays_within((*site.inputs, *site.outputs), statistics)
        return Option(form) if fits else None

    def _float8(self, form: str, site: Site, program: Program) -> Option | None:
        parameters: dict[str, Any] = {"opset": float8.OPSETS[form]}
        if form == "stored-mxf8":
            parameters["block"] = stored_block(site, program, float8.BLOCK)
        return Option(form, parameters)

    def _channels(self, bits: int, site: Site, program: Program, statistics: Any) -> dict[str, Any]:
        """How weights with a scale a channel are made."""
        balance = "none"
        if site.kind == "conv" and math.prod(weights_of(site, program)[0].shape[2:]) > 1:
            balance = "kernel"
        elif site.kind in ("conv", *_LINEAR) and shares_mean(program, site.inputs[0], statistics):
            balance = "row"
        return {"weight_bits": bits, "clipping": self.clipping, "balance": balance}

    def _smoothing(
        self, site: Site, program: Program, statistics: Any, bits: int, ranges: str | None
    ) -> Smoothing | None:
        if not self.smoothing or site.kind not in _LINEAR or is_left(site, program):
            return None
        return choose_smoothing(
            program, site.inputs[0], statistics, rules=self.smoothing, bits=bits, ranges=ranges
        )

    def _corrected(
        self, parameters: dict[str, Any], site: Site, program: Program, statistics: Any
    ) -> dict[str, Any]:
        if self.correct_bias:
            shift = bias_shift(site, nodes_of(site, program), statistics, parameters)
            if shift is not None:
                return {**parameters, "bias_shift": shift}
        return parameters

    def _static(self, site: Site, program: Program, statistics: Any, bits: int) -> Option | None:
        inputs = [activation_range(program, name, statistics, self.ranges) for name in site.inputs]
        if any(given is None for given in inputs):
            return None
        if site.kind == "product":
            return Option("w8a8-static", {"inputs": inputs}, "int8", "float")
        output = None
        if site.kind == "conv" or site.kind in CARRIERS:
            output = activation_range(program, site.outputs[0], statistics, self.ranges)
        if site.kind in CARRIERS:
            parameters: dict[str, Any] = {"inputs": inputs, "output": output}
            return None if output is None else Option("w8a8-static", parameters, "int8", "int8")
        parameters = {"input": inputs[0], **self._channels(bits, site, program, statistics)}
        if (found := self._smoothing(site, program, statistics, bits, self.ranges)) is not None:
            parameters["input"] = {"scale": found.scale, "zero_point": found.zero_point}
            parameters["smooth"] = found.parameters()
        parameters = self._corrected(parameters, site, program, statistics)
        if site.kind != "conv":
            return Option("w8a8-static", parameters, "int8", "float")
        written: Form = "int8"
        return (
            None
            if output is None
            else Option("w8a8-static", {**parameters, "output": output}, "int8", written)
        )


# Types and operators the codes of a width are written with.
_STORED_OPSET = {4: 21, 3: 13, 2: 13}
_OPERATORS = {"conv": "Conv", "matmul": "MatMul", "gemm": "Gemm"}


def _capabilities(target: Any) -> Mapping[str, Any] | None:
    """What the target has kernels for; None where no target is given."""
    if target is None:
        return None
    from lamina.backends import get_backend
    from lamina.backends.backend import Target

    parsed = Target.parse(target)
    return get_backend(parsed).capabilities(parsed)
