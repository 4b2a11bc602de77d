"""Derivatives of a program's loss with respect to its weights: gradients, and Hessians times vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lamina.analysis.gradient_estimates import Estimate, Running
from lamina.analysis.gradient_loss import Loss
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.fx import initializer_names, to_fx
from lamina.ir.fx_values import to_tensor
from lamina.ir.program import Program


class Differentiable:
    """A program as a module, its named weights, and its outputs for a batch.

    Args:
        program: Left unchanged.
        weights: Initializers to differentiate by; the rest are constants.
        device: Where it runs.
        precision: A floating torch dtype in place of the program's, or None.
    """

    def __init__(self, program: Program, weights: Sequence[str], device: str, precision: Any) -> None:
        self._program = program
        self._precision = precision
        self._device = torch.device(device)
        self.module = to_fx(program, precision=precision).to(self._device)
        paths = {initializer: path for path, initializer in initializer_names(self.module).items()}
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self.module.requires_grad_(False)
        self.weights: dict[str, Tensor] = {}
        for name in dict.fromkeys(weights):
            if paths.get(name) in tensors:
                self.weights[name] = tensors[paths[name]].requires_grad_()

    def outputs(self, batch: Dataset) -> tuple[Tensor, ...]:
        """What the module answers."""
        return tuple(self.module(*(self._input(batch, p.name, p.dtype) for p in self._program.inputs)))

    def _input(self, batch: Dataset, name: str, dtype: Any) -> Tensor:
        if name not in batch.inputs:
            raise DataError(f"the data lacks the input '{name}'", advice="give one array an input")
        tensor = to_tensor(batch.inputs[name], dtype).to(self._device)
        return tensor.to(self._precision) if self._precision and tensor.is_floating_point() else tensor

    def gradients(self, scalar: Tensor, **options: Any) -> dict[str, Tensor]:
        """Of a scalar, by weight; zeros where it does not depend on one."""
        found = torch.autograd.grad(scalar, list(self.weights.values()), allow_unused=True, **options)
        return {
            n: torch.zeros_like(w) if g is None else g
            for (n, w), g in zip(self.weights.items(), found, strict=True)
        }


def traces(
    model: Differentiable,
    dataset: Dataset,
    loss: Loss,
    draws: int,
    seed: int,
    curvature: str,
    tell: Callable[[int], None] = lambda samples: None,
) -> Mapping[str, Estimate]:
    """Trace of each weight's diagonal block of the loss Hessian or of its Gauss-Newton part, by Hutchinson.

    ``hessian``: ``tr(H_l) = E v_l' (H v)_l`` for v of independent +-1. One v over all weights serves every
    block, because what couples different blocks has mean zero; with many layers that coupling is most of the
    noise, and an estimate can be negative. ``draws`` double backward passes a batch.

    ``gauss-newton``: ``tr(J' F J)_l = E L2(g_l)^2`` for the gradient of :meth:`Loss.probe`, which has the
    random signs at the outputs: no coupling between layers, never negative, one backward pass a draw.

    An observation is the mean over the draws of one batch, so the standard error holds the spread over the
    data and over the draws; with a single batch it is one draw, and the error that of the draws alone.
    ``tell`` is called with the samples of each batch done.

    Source: Hutchinson 1990, Comm. Stat. 19(2); Dong et al. 2020 (HAWQ-V2), arXiv:1911.03852, sec. 3.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = _hessian_draws if curvature == "hessian" else _gauss_newton_draws
    batches = {name: Running() for name in model.weights}
    single: dict[str, Running] = {}
    count = 0
    for batch in dataset.batches():
        count += 1
        single = {name: Running() for name in model.weights}
        for found in draw(model, batch, loss, draws, generator):
            for name, value in found.items():
                single[name].add(value)
        for name, r in single.items():
            batches[name].add(r.estimate().mean, batch.samples)
        tell(batch.samples)
    return {name: r.estimate() for name, r in (batches if count > 1 else single).items()}


def _hessian_draws(
    model: Differentiable, batch: Dataset, loss: Loss, draws: int, generator: torch.Generator
) -> Iterator[Mapping[str, float]]:
    first = model.gradients(loss.per_sample(model.outputs(batch), batch).mean(), create_graph=True)
    for _ in range(draws):
        probes = {n: _signs(w, generator) for n, w in model.weights.items()}
        products = _hessian_times(model, first, probes)
        yield {n: float((p.double() * probes[n].double()).sum()) for n, p in products.items()}


def _gauss_newton_draws(
    model: Differentiable, batch: Dataset, loss: Loss, draws: int, generator: torch.Generator
) -> Iterator[Mapping[str, float]]:
    outputs = model.outputs(batch)
    for index in range(draws):
        scalar = loss.probe(outputs, batch, generator)
        found = model.gradients(scalar, retain_graph=index + 1 < draws)
        yield {n: float(g.double().square().sum()) for n, g in found.items()}


def _hessian_times(
    model: Differentiable, first: Mapping[str, Tensor], vectors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """``H v`` by weight, from gradients that still have their graph."""
    inner = torch.stack([(g * vectors[n]).sum() for n, g in first.items()]).sum()
    if not inner.requires_grad:  # a loss linear in every weight has no curvature
        return {n: torch.zeros_like(w) for n, w in model.weights.items()}
    return model.gradients(inner, retain_graph=True)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return (bits * 2 - 1).to(device=like.device, dtype=like.dtype)


def fisher_diagonals(
    model: Differentiable,
    dataset: Dataset,
    loss: Loss,
    seed: int,
    tell: Callable[[int], None] = lambda samples: None,
) -> Mapping[str, Estimate]:
    """Mean over samples, and over a weight's elements, of the squared gradient of a sample's log-likelihood.

    Squared sample by sample: the square of a batch's mean gradient is another, smaller number. Targets are
    the data's where it has them (the empirical Fisher information), else drawn from the model's own
    prediction, one a sample (the true one, by Monte Carlo).

    Cost: a forward and a backward pass a sample; the batch size does not matter.
    """
    generator = torch.Generator().manual_seed(seed)
    running = {name: Running() for name in model.weights}
    for batch in one_by_one(dataset):
        outputs = model.outputs(batch)
        losses = loss.per_sample(outputs, batch, loss.draw(outputs, generator))
        for index in range(batch.samples):
            found = model.gradients(losses[index], retain_graph=index + 1 < batch.samples)
            for name, gradient in found.items():
                running[name].add(float(gradient.double().square().mean()))
        tell(batch.samples)
    return {name: r.estimate() for name, r in running.items()}


def one_by_one(dataset: Dataset) -> Iterator[Dataset]:
    """Batches of one sample, or of as many as the model insists on."""
    return replace(dataset, batch_size=dataset.group).batches()
