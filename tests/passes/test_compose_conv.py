"""One composed convolution equals two in a row, whatever their kernels, strides, pads and groups."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lamina.passes.compose_conv import ConvForm, compose, form_of, why_edges

CONV = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d}
GROUPS = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 2), (4, 4), (3, 2)]


def apply_form(form: ConvForm, x: np.ndarray) -> np.ndarray:
    shape = form.shape
    rank = len(shape.kernel)
    pads = [p for pair in zip(shape.begins[::-1], shape.ends[::-1], strict=True) for p in pair]
    padded = torch.nn.functional.pad(torch.from_numpy(x), pads)
    weight, bias = torch.from_numpy(form.weight), torch.from_numpy(form.bias)
    options = {"stride": shape.strides, "dilation": shape.dilations, "groups": shape.group}
    return CONV[rank](padded, weight, bias, **options).numpy()


@st.composite
def pairs(draw, *, padded: bool):
    rank = draw(st.integers(1, 2))
    g1, g2 = draw(st.sampled_from(GROUPS))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))

    def ints(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    def form(inputs: int, outputs: int, group: int, pads: bool, bias: bool) -> ConvForm:
        weight = random.standard_normal((outputs, inputs // group, *ints(1, 3)))
        offset = random.standard_normal(outputs) * bias
        zeros = (0,) * rank
        begins, ends = (ints(0, 3), ints(0, 3)) if pads else (zeros, zeros)
        return form_of(weight, offset, ints(1, 3), ints(1, 2), begins, ends, group)

    first = form(12, 12, g1, True, draw(st.booleans()) or not padded)
    second = form(12, 8 if g2 != 3 else 9, g2, padded, True)
    size = ints(17, 23)  # the longest composed kernel spans 17
    return first, second, random.standard_normal((2, 12, *size))


@settings(deadline=None, max_examples=150)
@given(pairs(padded=False))
def test_exact_where_the_second_pads_nothing(case):
    first, second, x = case
    made = compose(first, second)
    assert not made.shape.edges
    np.testing.assert_allclose(apply_form(made, x), apply_form(second, apply_form(first, x)), atol=1e-10)


@settings(deadline=None, max_examples=300)
@given(pairs(padded=True))
def test_exact_wherever_it_says_so(case):
    first, second, x = case
    made = compose(first, second)
    got, want = apply_form(made, x), apply_form(second, apply_form(first, x))
    assert got.shape == want.shape
    if not made.shape.edges:
        np.testing.assert_allclose(got, want, atol=1e-10)


@settings(deadline=None, max_examples=150)
@given(pairs(padded=True))
def test_borders_differ_where_it_says_so_and_nothing_else_does(case):
    first, second, x = case
    made = compose(first, second)
    assume(made.shape.edges)
    got, want = apply_form(made, x), apply_form(second, apply_form(first, x))
    middle = np.array(apply_form(first, x).shape[2:])
    inner = []
    for axis, size in enumerate(got.shape[2:]):
        at = np.arange(size) * second.shape.strides[axis] - second.shape.begins[axis]
        whole = (at >= 0) & (at + second.shape.reach[axis] < middle[axis])
        inner.append(np.flatnonzero(whole))
    index = np.ix_(range(2), range(got.shape[1]), *inner)
    np.testing.assert_allclose(got[index], want[index], atol=1e-10)


def test_pointwise_without_bias_before_padding_is_exact():
    random = np.random.default_rng(0)
    first = form_of(random.standard_normal((6, 4, 1, 1)), np.zeros(6), (1, 1), (1, 1), (0, 0), (0, 0))
    weight, bias = random.standard_normal((6, 1, 3, 3)), random.standard_normal(6)
    second = form_of(weight, bias, (2, 2), (1, 1), (1, 1), (1, 1), 6)
    x = random.standard_normal((1, 4, 9, 9))
    made = compose(first, second)
    assert not made.shape.edges
    assert made.shape.group == 1
    assert made.shape.kernel == (3, 3)
    np.testing.assert_allclose(apply_form(made, x), apply_form(second, apply_form(first, x)), atol=1e-10)
    biased = form_of(first.weight, random.standard_normal(6), (1, 1), (1, 1), (0, 0), (0, 0))
    assert (
        why_edges(biased.shape, second.shape) == "the second pads with zeros, where the first gives its bias"
    )
    assert (
        why_edges(second.shape, form_of(np.ones((6, 6, 3, 3)), np.zeros(6), *[(1, 1)] * 4).shape) is not None
    )


def test_steps_that_share_a_divisor_are_dilated_not_filled():
    first = form_of(np.ones((1, 1, 3)), np.zeros(1), (2,), (2,), (0,), (0,))
    second = form_of(np.ones((1, 1, 3)), np.zeros(1), (1,), (1,), (0,), (0,))
    made = compose(first, second)
    assert (made.shape.kernel, made.shape.dilations, made.shape.strides) == ((5,), (2,), (2,))
    assert made.weight.ravel().tolist() == [1, 2, 3, 2, 1]
