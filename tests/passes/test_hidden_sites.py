"""Which hidden channels may be merged, and why others may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from reference import models_dir, needs_reference
from residual_nets import WIDTH, Net, finished, image, tokens

from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.passes.fold import fold
from lamina.passes.neurons.hidden_sites import hidden_sites


def residual(body: Callable[[Net, ir.Value], ir.Value]) -> Program:
    """lin(s + body(s)), s = lin(x)."""
    net = Net()
    x = net.linear(tokens(net), name="before")
    return finished(net, net.linear(net.op("Add", x, body(net, x)), name="after"))


def through(middle: Callable[[Net, ir.Value], ir.Value]) -> Program:
    """An MLP with something between its two layers."""

    def body(net: Net, x: ir.Value) -> ir.Value:
        return net.linear(middle(net, net.linear(x, 2 * WIDTH, "fc1")), WIDTH, "fc2", width=2 * WIDTH)

    return residual(body)


def reasons(program: Program) -> str:
    sites, refused = hidden_sites(program)
    assert not sites
    return "\n".join(f"{where}: {reason}" for where, reason in refused)


def test_an_mlp_is_one_site_named_after_its_branch():
    program = residual(lambda net, x: net.mlp(x))
    (site,), refused = hidden_sites(program)
    (group,) = site.groups
    assert site.kind == "mlp"
    assert "mlp" in site.name
    assert (group.units, group.axis) == (2 * WIDTH, -1)
    assert site.weights == ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight")
    assert [o.side for o in group.operands] == ["made", "made", "read"]
    assert any("residual stream" in reason for _, reason in refused)


def test_a_gate_and_what_it_gates_are_one_width():
    def gated(net: Net, x: ir.Value) -> ir.Value:
        gate = net.op("Sigmoid", net.linear(x, 12, "gate"))
        return net.linear(net.op("Mul", gate, net.linear(x, 12, "up")), WIDTH, "down", width=12)

    (site,), _ = hidden_sites(residual(gated))
    (group,) = site.groups
    assert group.units == 12
    assert len([o for o in group.operands if o.side == "made"]) == 4


def test_widths_that_share_an_operator_are_one_site():
    def deep(net: Net, x: ir.Value) -> ir.Value:
        y = net.op("Relu", net.linear(x, 12, "a"))
        y = net.op("Relu", net.linear(y, 16, "b", width=12))
        return net.linear(y, WIDTH, "c", width=16)

    (site,), _ = hidden_sites(residual(deep))
    assert [g.units for g in site.groups] == [12, 16]
    assert len(site.nodes) == 7


def test_two_mlps_of_one_branch_have_names_of_their_own():
    def both(net: Net, x: ir.Value) -> ir.Value:
        return net.mlp(net.norm(net.mlp(x, "one")), "two")

    sites, _ = hidden_sites(residual(both))
    assert len({s.name for s in sites}) == 2


def test_the_channels_between_two_convolutions():
    net = Net()
    x = net.op("Conv", image(net), net.weight(4, 4, 3, 3), pads=[1] * 4)
    y = net.op("Relu", net.op("Conv", x, net.weight(6, 4, 3, 3), net.weight(6), pads=[1] * 4))
    y = net.op("Conv", y, net.weight(4, 6, 1, 1))
    (site,), _ = hidden_sites(finished(net, net.op("Add", x, y)))
    assert (site.kind, site.groups[0].units, site.groups[0].axis) == ("conv", 6, 1)


def test_a_network_without_branches_has_sites_too():
    net = Net()
    y = net.op("Relu", net.linear(tokens(net), 12, "a"))
    (site,), _ = hidden_sites(finished(net, net.linear(y, 4, "b", width=12)))
    assert site.groups[0].units == 12


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda net, h: net.op("Softmax", h, axis=-1), "softmax"),
        (
            lambda net, h: net.op("LayerNormalization", h, net.weight(2 * WIDTH), net.weight(2 * WIDTH)),
            "mean or spread over channels",
        ),
        (lambda net, h: net.op("CumSum", h, net.array(np.int64(-1))), "CumSum"),
        (
            lambda net, h: net.op("Reshape", net.op("Reshape", h, net.ints(0, 0, 4, 4)), net.ints(0, 0, 16)),
            "a unit is more or less than one channel",
        ),
    ],
)
def test_what_mixes_or_regroups_channels_is_refused(middle, reason: str):
    assert reason.lower() in reasons(through(middle)).lower()


def test_channels_of_the_interface_are_refused():
    net = Net()
    x = tokens(net)
    hidden = net.op("Relu", net.linear(x, 12, "a"))
    program = finished(net, net.linear(hidden, 4, "b", width=12), hidden)
    assert "an output of the model" in reasons(program)


def test_a_weight_that_a_caller_may_replace_is_refused():
    net = Net()
    hidden = net.op("Relu", net.linear(tokens(net), 12, "a"))
    out = net.linear(hidden, 4, "b", width=12)
    net.inputs.append(next(v for v in net.initializers if v.name == "a.weight"))
    program = replace(net.program(out), example={"x": np.zeros((2, 3, WIDTH), np.float32)})
    assert "a.weight" not in reasons(program)


def test_channels_that_several_operators_read_are_refused():
    def forked(net: Net, x: ir.Value) -> ir.Value:
        hidden = net.op("Relu", net.linear(x, 12, "a"))
        return net.op("Add", net.linear(hidden, WIDTH, "b", 12), net.linear(hidden, WIDTH, "c", 12))

    assert "read by several operators" in reasons(residual(forked))


def test_grouped_convolutions_are_refused():
    net = Net()
    y = net.op("Conv", image(net), net.weight(6, 4, 1, 1))
    y = net.op("Conv", net.op("Relu", y), net.weight(6, 1, 3, 3), group=6)
    program = finished(net, net.op("Conv", y, net.weight(4, 6, 1, 1)))
    assert "grouped convolution" in reasons(program)


def test_heads_are_refused():
    found = reasons(residual(lambda net, x: net.attention(x)))
    assert "a unit is more or less than one channel" in found


def test_a_program_that_does_not_run_has_no_sites():
    net = Net()
    x = tokens(net)
    y = net.op("Reshape", net.op("Relu", net.linear(x, 12, "a")), net.ints(-1, 7))
    program = finished(net, net.op("Unknown", y, domain="nobody"))
    assert "does not run" in reasons(program)


@needs_reference
@pytest.mark.parametrize(
    ("model", "sites", "units"),
    [
        ("kwt1_speech_commands.onnx", 12, {256}),
        ("stories260k/stories260k.onnx", 5, {172}),
        ("resnet56_cifar10.onnx", 27, {16, 32, 64}),
    ],
)
def test_every_mlp_and_body_of_reference_models(model: str, sites: int, units: set[int]):
    path = next(models_dir.rglob(model.rpartition("/")[2]), None)
    if path is None:
        pytest.skip(f"no {model}")
    program, _, _ = fold(capture(str(path)))
    found, _ = hidden_sites(program)
    assert len(found) == sites
    assert {g.units for s in found for g in s.groups} == units
