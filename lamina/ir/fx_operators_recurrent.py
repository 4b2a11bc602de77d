"""FX forms of LSTM, GRU and RNN, step by step: differentiable twice, on every device.

Shapes of all: x ``[steps, b, in]``, w ``[directions, gates * h, in]``, r ``[directions, gates * h, h]``,
bias ``[directions, 2 * gates * h]``, states ``[directions, b, h]``; y ``[steps, directions, b, h]``. With
``layout=1`` the batch comes first everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lamina.ir import fx_operators_math as math_

State = tuple[Tensor, ...]

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "affine": lambda x, alpha=1.0, beta=0.0: alpha * x + beta,
    "leakyrelu": lambda x, alpha=0.01: math_.leaky_relu(x, alpha=alpha),
    "thresholdedrelu": lambda x, alpha=1.0: math_.thresholded_relu(x, alpha=alpha),
    "scaledtanh": lambda x, alpha=1.0, beta=1.0: alpha * torch.tanh(beta * x),
    "hardsigmoid": lambda x, alpha=0.2, beta=0.5: math_.hard_sigmoid(x, alpha=alpha, beta=beta),
    "elu": lambda x, alpha=1.0: math_.elu(x, alpha=alpha),
    "softsign": math_.softsign,
    "softplus": math_.softplus,
}
_TAKES = {"affine": 2, "leakyrelu": 1, "thresholdedrelu": 1, "scaledtanh": 2, "hardsigmoid": 2, "elu": 1}


class _Activations:
    """The functions of one direction, behind the clip."""

    def __init__(
        self, names: Sequence[str], alphas: Sequence[float], betas: Sequence[float], clip: float
    ) -> None:
        # Parameters are listed only for the functions that take them, in order.
        first, second = iter(alphas), iter(betas)
        self._calls: list[tuple[Callable[..., Tensor], dict[str, float]]] = []
        for name in names:
            takes, options = _TAKES.get(name.lower(), 0), {}
            alpha = next(first, None) if takes >= 1 else None
            beta = next(second, None) if takes >= 2 else None
            options = {k: v for k, v in (("alpha", alpha), ("beta", beta)) if v is not None}
            self._calls.append((_ACTIVATIONS[name.lower()], options))
        self._clip = clip

    def __call__(self, which: int, x: Tensor, *, clipped: bool = True) -> Tensor:
        if self._clip and clipped:
            x = torch.clamp(x, -self._clip, self._clip)
        function, options = self._calls[which]
        return function(x, **options)


def _scan(
    x: Tensor, lengths: Tensor | None, state: State, step: Callable[[Tensor, State], State], backward: bool
) -> tuple[Tensor, State]:
    """Run one direction; a sequence that has ended keeps its state and answers zero."""
    outputs: list[Tensor] = []
    order = range(x.shape[0])
    for i in reversed(order) if backward else order:
        new = step(x[i], state)
        if lengths is None:
            state = new
            outputs.append(new[0])
        else:
            live = (lengths > i)[:, None]
            state = tuple(torch.where(live, n, s) for n, s in zip(new, state, strict=True))
            outputs.append(torch.where(live, new[0], torch.zeros_like(new[0])))
    if not outputs:
        return state[0].new_zeros(0, *state[0].shape), state
    return torch.stack(outputs[::-1] if backward else outputs), state


def _run(
    x: Tensor,
    w: Tensor,
    lengths: Tensor | None,
    states: Sequence[Tensor | None],
    hidden: int,
    direction: str,
    layout: int,
    activations: Sequence[_Activations],
    make: Callable[[int, _Activations], Callable[[Tensor, State], State]],
) -> tuple[Tensor, ...]:
    if layout:
        x = x.transpose(0, 1)
        states = [None if s is None else s.transpose(0, 1) for s in states]
    ways = 2 if direction == "bidirectional" else 1
    outputs, ends = [], []
    for way in range(ways):
        start = tuple(x.new_zeros(x.shape[1], hidden) if s is None else s[way] for s in states)
        backward = direction == "reverse" or way == 1
        # the inputs' share of all gates in one product, ahead of the steps
        y, end = _scan(torch.matmul(x, w[way].T), lengths, start, make(way, activations[way]), backward)
        outputs.append(y)
        ends.append(end)
    y = torch.stack(outputs, 1)
    last = [torch.stack(parts) for parts in zip(*ends, strict=True)]
    if layout:
        return y.permute(2, 0, 1, 3), *[s.transpose(0, 1) for s in last]
    return y, *last


def _functions(
    names: Sequence[str] | None,
    default: Sequence[str],
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
    clip: float,
    direction: str,
) -> list[_Activations]:
    ways = 2 if direction == "bidirectional" else 1
    listed = list(names or list(default) * ways)
    per = len(default)
    made, used_alpha, used_beta = [], 0, 0
    for way in range(ways):
        mine = listed[way * per : (way + 1) * per]
        made.append(_Activations(mine, (alphas or [])[used_alpha:], (betas or [])[used_beta:], clip))
        used_alpha += sum(_TAKES.get(n.lower(), 0) >= 1 for n in mine)
        used_beta += sum(_TAKES.get(n.lower(), 0) >= 2 for n in mine)
    return made


def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float = 0.0,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """Long short-term memory; gates in the order input, output, forget, cell. Gives y, h, c."""
    hidden = r.shape[-1]

    def make(way: int, f: _Activations) -> Callable[[Tensor, State], State]:
        shift = 0 if bias is None else bias[way, : 4 * hidden] + bias[way, 4 * hidden :]
        back = r[way].T
        peep: Any = (0, 0, 0) if peepholes is None else peepholes[way].chunk(3)

        def step(xt: Tensor, state: State) -> State:
            h, c = state
            i, o, g, cell = (xt + shift + h @ back).chunk(4, -1)
            i = f(0, i + peep[0] * c)
            g = 1 - i if input_forget else f(0, g + peep[2] * c)
            c = g * c + i * f(1, cell)
            o = f(0, o + peep[1] * c)
            return o * f(2, c, clipped=False), c

        return step

    functions = _functions(
        activations, ("Sigmoid", "Tanh", "Tanh"), activation_alpha, activation_beta, clip, direction
    )
    return _run(x, w, lengths, (initial_h, initial_c), hidden, direction, layout, functions, make)


def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float = 0.0,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    """Gated recurrent unit; gates in the order update, reset, hidden. Gives y, h."""
    hidden = r.shape[-1]

    def make(way: int, f: _Activations) -> Callable[[Tensor, State], State]:
        both = x.new_zeros(6 * hidden) if bias is None else bias[way]
        wb, rb = both[: 3 * hidden], both[3 * hidden :]
        gates, inner_back = r[way, : 2 * hidden].T, r[way, 2 * hidden :].T
        gate_shift, inner_shift = rb[: 2 * hidden], rb[2 * hidden :]

        def step(xt: Tensor, state: State) -> State:
            (h,) = state
            both_gates = xt[:, : 2 * hidden] + wb[: 2 * hidden] + h @ gates + gate_shift
            z, reset = f(0, both_gates).chunk(2, -1)
            xh = xt[:, 2 * hidden :] + wb[2 * hidden :]
            if linear_before_reset:
                inner = reset * (h @ inner_back + inner_shift)
            else:
                inner = (reset * h) @ inner_back + inner_shift
            return ((1 - z) * f(1, xh + inner) + z * h,)

        return step

    functions = _functions(
        activations, ("Sigmoid", "Tanh"), activation_alpha, activation_beta, clip, direction
    )
    return _run(x, w, lengths, (initial_h,), hidden, direction, layout, functions, make)


def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float = 0.0,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """Plain recurrent network. Gives y, h."""
    hidden = r.shape[-1]

    def make(way: int, f: _Activations) -> Callable[[Tensor, State], State]:
        shift = 0 if bias is None else bias[way, :hidden] + bias[way, hidden:]
        back = r[way].T

        def step(xt: Tensor, state: State) -> State:
            return (f(0, xt + shift + state[0] @ back),)

        return step

    functions = _functions(activations, ("Tanh",), activation_alpha, activation_beta, clip, direction)
    return _run(x, w, lengths, (initial_h,), hidden, direction, layout, functions, make)
