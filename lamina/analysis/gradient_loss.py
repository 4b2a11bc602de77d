"""The scalar whose derivatives the gradient metrics take, one number a sample: chosen from model and data.

A sample's loss is the mean over its positions that count (tokens, pixels), the data's the mean over samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.data import Dataset
from lamina.data.joining import IGNORED_LABEL
from lamina.errors import DataError
from lamina.ir.program import Program
from lamina.quality.choose import get_metric
from lamina.quality.outputs import (
    are_probabilities,
    class_axis,
    float_outputs,
    gives_logits,
    main_output,
    token_mask,
)

LOSSES = ("cross-entropy", "next-token", "kl", "mse")
_LOGITS = ("logit", "prob", "score", "softmax", "class")


@dataclass(frozen=True)
class Loss:
    """One loss, bound to an output.

    Attributes:
        name: One of :data:`LOSSES`, or ``user``.
        output: Position of the output it reads.
        tokens: The token input of ``next-token``.
        function: The user's own: outputs and batch to one loss a sample.
    """

    name: str
    output: int = 0
    tokens: str = ""
    function: Callable[[tuple[Tensor, ...], Dataset], Tensor] | None = None

    @property
    def is_own_target(self) -> bool:
        """Whether the model's own answer is the target: no gradient there, but curvature."""
        return self.name in ("kl", "mse")

    def per_sample(self, outputs: tuple[Tensor, ...], batch: Dataset, target: Tensor | None = None) -> Tensor:
        """The loss ``[samples]`` of a batch.

        Args:
            outputs: The module's.
            batch: What made them.
            target: From :meth:`draw` or :meth:`own`, where the loss needs one.

        Raises:
            DataError: The data does not hold what the loss needs, or it does not fit the outputs.
        """
        if self.function is not None:
            return self.function(outputs, batch)
        answer = _answer(outputs[self.output])
        if self.name == "mse":
            return _squared_error(answer, answer.detach() if target is None else target, batch)
        logs = _log_probabilities(answer)
        if self.name == "kl" and (target is None or target.dtype.is_floating_point):
            return _kl(logs, logs.detach() if target is None else target, batch)
        if self.name == "kl" and target is not None:
            return _mean_over_positions(-_picked(logs, target), _mask(batch, answer, target.shape), batch)
        return self._cross_entropy(logs, batch)

    def _cross_entropy(self, logs: Tensor, batch: Dataset) -> Tensor:
        logs, labels, counted = self._targets(logs, batch)
        return _mean_over_positions(-_picked(logs, torch.where(counted, labels, 0)), counted, batch)

    def _targets(self, logs: Tensor, batch: Dataset) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions that have a label, their labels, and which of them count."""
        labels = torch.from_numpy(self._labels(batch)).to(logs.device)
        where = f"loss '{self.name}'"
        misfit = f"labels of shape {list(labels.shape)} do not go with predictions {list(logs.shape)}"
        if logs.ndim == 3:
            if labels.shape != logs.shape[:2]:
                raise DataError(misfit, where=where, advice="give one class number a position")
            mask = token_mask(batch, tuple(logs.shape))
            if mask is not None:
                labels = torch.where(torch.from_numpy(mask).to(logs.device) != 0, labels, IGNORED_LABEL)
            logs, labels = logs[:, :-1], labels[:, 1:]
        axis = class_axis(logs.ndim) % logs.ndim
        shape = [d for i, d in enumerate(logs.shape) if i != axis]
        if labels.numel() != math.prod(shape):
            raise DataError(misfit, where=where, advice="give one class number a prediction")
        labels = labels.reshape(shape)
        counted = labels != IGNORED_LABEL
        if bool((counted & ((labels < 0) | (labels >= logs.shape[axis]))).any()):
            what = f"a label is none of the model's {logs.shape[axis]} classes"
            raise DataError(what, where=where, advice="count classes from 0; mark ignored ones -100")
        return logs, labels, counted

    def _labels(self, batch: Dataset) -> np.ndarray:
        if self.name == "next-token":
            return np.asarray(batch.inputs[self.tokens], np.int64)
        labels = batch.extras.get("labels")
        if labels is None or labels.dtype.kind not in "iub":
            what = f"loss '{self.name}' needs integer labels"
            raise DataError(what, where="the data", advice="add an array 'labels', or ask for loss='kl'")
        return np.asarray(labels, np.int64)

    def probe(self, outputs: tuple[Tensor, ...], batch: Dataset, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient g has ``E g g'`` equal to the loss's Gauss-Newton matrix.

        For class scores that matrix is ``E_c p_c (d log p_c)(d log p_c)'``, so each log-probability gets a
        random sign and the root of its probability; for ``mse`` it is ``J'J``, so each output gets a sign.
        Labels do not enter, but which positions count does.

        Raises:
            DataError: The loss is the user's own: what its Gauss-Newton matrix is cannot be told.
        """
        if self.function is not None:
            what = "a loss of one's own has no Gauss-Newton matrix lamina knows"
            raise DataError(what, advice="ask for curvature='hessian'")
        values = _answer(outputs[self.output])
        root = torch.ones_like(values)
        if self.name == "mse":
            counted = _mask(batch, values, values.shape[: 2 if values.ndim == 3 else 1])
            weight = _position_weights(counted, batch).reshape(
                *counted.shape, *[1] * (values.ndim - counted.ndim)
            )
        else:
            values = _log_probabilities(values)
            axis = class_axis(values.ndim)
            if self.name == "kl":
                counted = _mask(batch, values, values.select(axis, 0).shape)
            else:
                values, _, counted = self._targets(values, batch)
            root = (values.detach() / 2).exp()
            weight = _position_weights(counted, batch).unsqueeze(axis)
        signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
        factor = root * weight.to(root.dtype).sqrt() * signs.to(device=root.device, dtype=root.dtype)
        return (values * factor).sum()

    def draw(self, outputs: tuple[Tensor, ...], generator: torch.Generator) -> Tensor | None:
        """A target drawn from the model's own prediction: classes, or the answer plus unit noise.

        None for losses that have their target in the data.
        """
        if not self.is_own_target:
            return None
        answer = _answer(outputs[self.output].detach())
        if self.name == "mse":
            noise = torch.randn(answer.shape, generator=generator, dtype=torch.float64)
            return answer + noise.to(device=answer.device, dtype=answer.dtype)
        chances = _log_probabilities(answer).exp().movedim(class_axis(answer.ndim), -1)
        flat = chances.reshape(-1, chances.shape[-1]).cpu().double()
        drawn = torch.multinomial(flat, 1, generator=generator)
        return drawn.reshape(chances.shape[:-1]).to(answer.device)


def choose_loss(program: Program, dataset: Dataset, spec: Any = None) -> Loss:
    """The loss ``spec`` names, or the one that suits the model and its data.

    With integer ``labels`` and class scores: ``cross-entropy`` (of the next label for
    ``[b, length, classes]``, as the metric of that name). For token logits without labels: ``next-token``.
    Without either the model's own answer is the target: ``kl`` for class scores, whose Hessian is that of the
    Fisher information of the output, ``mse`` otherwise, ``1/2 L2(y - y0)^2``. Both Hessians are exactly
    Gauss-Newton ones, since the residual is zero.

    Args:
        program: The model.
        dataset: Its data.
        spec: None, a name in :data:`LOSSES`, or a callable of outputs and batch to ``[samples]``.

    Raises:
        DataError: The name is unknown, or the data lacks what the loss needs.
    """
    if callable(spec):
        return Loss("user", function=spec)
    name = spec if spec is not None else _suitable(program, dataset)
    if name not in LOSSES:
        raise DataError(
            f"loss '{name}' is unknown", advice=f"there are {', '.join(LOSSES)}, or give a callable"
        )
    names = [p.name for p in program.outputs]
    output = names.index(main_output(program, () if name == "mse" else _LOGITS, name))
    tokens = getattr(get_metric("cross-entropy", program), "tokens", "") if name == "next-token" else ""
    if name == "next-token" and not tokens:
        raise DataError("loss 'next-token' needs one integer input with tokens", advice="ask for loss='kl'")
    return Loss(name, output, tokens)


def _suitable(program: Program, dataset: Dataset) -> str:
    labels = dataset.extras.get("labels")
    if not gives_logits(program):
        return "mse"
    if labels is not None and labels.dtype.kind in "iub":
        return "cross-entropy"
    tokens = getattr(get_metric("cross-entropy", program), "tokens", "")
    return "next-token" if tokens and len(float_outputs(program)[0].shape) == 3 else "kl"


def _answer(values: Tensor) -> Tensor:
    while values.ndim > 2 and values.shape[-1] == 1:  # classifiers from convnets keep [b, classes, 1, 1]
        values = values[..., 0]
    return values


def _log_probabilities(answer: Tensor) -> Tensor:
    axis = class_axis(answer.ndim)
    if are_probabilities(answer.detach().cpu().float().numpy(), axis):
        return torch.log(answer.clamp(min=1e-30))
    return torch.log_softmax(answer, axis)


def _picked(logs: Tensor, labels: Tensor) -> Tensor:
    axis = class_axis(logs.ndim)
    return torch.gather(logs, axis, labels.unsqueeze(axis)).squeeze(axis)


def _kl(logs: Tensor, target: Tensor, batch: Dataset) -> Tensor:
    each = (target.exp() * (target - logs)).sum(class_axis(logs.ndim))
    return _mean_over_positions(each, _mask(batch, logs, each.shape), batch)


def _squared_error(answer: Tensor, target: Tensor, batch: Dataset) -> Tensor:
    square = (answer - target).square() / 2
    each = square.sum(-1) if answer.ndim == 3 else square.reshape(len(square), -1).sum(1)
    return _mean_over_positions(each, _mask(batch, answer, each.shape), batch)


def _mask(batch: Dataset, answer: Tensor, shape: Any) -> Tensor:
    mask = token_mask(batch, tuple(answer.shape)) if answer.ndim == 3 else None
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=answer.device)
    return torch.from_numpy(mask).to(answer.device) != 0


def _mean_over_positions(each: Tensor, counted: Tensor, batch: Dataset) -> Tensor:
    rows = (each * counted).reshape(batch.samples, -1).sum(1)
    return rows / counted.reshape(batch.samples, -1).sum(1).clamp(min=1)


def _position_weights(counted: Tensor, batch: Dataset) -> Tensor:
    """What each position weighs in the mean over samples of the mean over a sample's positions."""
    rows = counted.reshape(batch.samples, -1).double()
    return (rows / rows.sum(1, keepdim=True).clamp(min=1) / batch.samples).reshape(counted.shape)
