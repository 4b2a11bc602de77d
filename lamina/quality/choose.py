"""From what the user wrote to a metric that fits the model."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from typing import Any

from lamina.data.interface import is_mask
from lamina.errors import BudgetError
from lamina.ir.program import Program
from lamina.quality.divergence import CosineDivergence, KlDivergence, RelativeL2
from lamina.quality.metric import Metric
from lamina.quality.outputs import float_outputs, gives_logits, main_output
from lamina.quality.task import CrossEntropy, Perplexity, Spearman, Top1
from lamina.quality.user import imported_metric, user_metric

METRICS: tuple[type[Metric], ...] = (
    Top1,
    Perplexity,
    CrossEntropy,
    Spearman,
    CosineDivergence,
    KlDivergence,
    RelativeL2,
)
_LOGITS = ("logit", "prob", "score", "softmax", "class")
_EMBEDDINGS = ("sentence_embedding", "embedding", "last_hidden_state", "hidden")
_NOT_TOKENS = ("mask", "type", "position", "segment", "length", "past", "cache")
_SMALLEST_DIRECTION = 8


def get_metric(spec: Any, program: Program) -> Metric:
    """The metric ``spec`` names, made to read the right outputs of ``program``.

    Args:
        spec: A name in ``METRICS``; ``module:function`` or ``file.py:function``; a callable
            ``f(outputs, data)``, higher better; ``(callable, "min")``; a ready :class:`Metric`; or None for
            the divergence that suits the outputs: KL for logits, 1 - cosine for vectors, else relative L2.
        program: The model.

    Raises:
        BudgetError: Nothing is called that, or the model has no output for it.
    """
    if isinstance(spec, Metric):
        return spec
    if spec is None:
        return _default(program)
    if isinstance(spec, str):
        return _named(spec.strip(), program)
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], str):
        return user_metric(spec[0], spec[1])
    return user_metric(spec)


def _default(program: Program) -> Metric:
    if gives_logits(program):
        return _named("kl", program)
    ports = float_outputs(program)
    last = [p.shape[-1] for p in ports if p.shape]
    vectors = len(last) == len(ports) and all(
        not isinstance(d, int) or d >= _SMALLEST_DIRECTION for d in last
    )
    return _named("cosine" if ports and vectors else "relative-l2", program)


def _named(name: str, program: Program) -> Metric:
    key = name.lower().replace("_", "-")
    known = next((metric for metric in METRICS if metric.name == key), None)
    if known is None:
        return imported_metric(name) if ":" in name else _extension(key, program)
    if known is Spearman:
        return Spearman(main_output(program, _EMBEDDINGS, key))
    if known is Top1:
        return Top1(main_output(program, _LOGITS, key))
    if known is KlDivergence:
        return KlDivergence(main_output(program, _LOGITS, key))
    if known is CrossEntropy or known is Perplexity:
        return known(main_output(program, _LOGITS, key), _token_input(program))
    main_output(program, (), key)
    names = tuple(p.name for p in float_outputs(program))
    return CosineDivergence(names) if known is CosineDivergence else RelativeL2(names)


def _extension(name: str, program: Program) -> Metric:
    """A metric some other package registered: its entry point is called with the program."""
    found = {point.name: point for point in entry_points(group="lamina.metrics")}
    if name in found:
        metric = found[name].load()(program)
        if isinstance(metric, Metric):
            return metric
        raise BudgetError(f"entry point '{name}' made no lamina.quality.Metric", where="lamina.metrics")
    names = [metric.name for metric in METRICS] + list(found)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f", did you mean {near[0]}" if near else ""
    advice = f"there are {', '.join(names)}; or give your own as module:function"
    raise BudgetError(f"metric '{name}' is unknown{hint}", advice=advice)


def _token_input(program: Program) -> str:
    """The integer input with the tokens, or nothing where that is not clear."""
    names = [
        port.name
        for port in program.inputs
        if port.dtype.is_integer()
        and len(port.shape) == 2
        and not is_mask(port.name)
        and not any(word in port.name.lower() for word in _NOT_TOKENS)
    ]
    preferred = [name for name in names if name in ("input_ids", "tokens")]
    return names[0] if len(names) == 1 else (preferred[0] if preferred else "")
