"""Each drop rule proposes what its formula says, and whatever a rule proposes can be dropped."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import pytest
from drop_nets import NETS, classifier, encoder_decoder, resnet, samples, transformer, unet
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import models_dir, needs_reference
from residual_nets import keeping, run, session_of, switched

from lamina.data import Dataset
from lamina.errors import BudgetError, DataError, PassError
from lamina.ir.branches import find_branches
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.passes.drop_branch import apply_drops
from lamina.planner.drop_evidence import DropEvidence, Droppable, DropSet, Layer, droppable, layers_of
from lamina.planner.drop_rules import RULES, additive_unet_drop, balanced_skip, get_rule
from lamina.planner.drop_sets import drop_sets


def data_of(program: Program, count: int = 12) -> Dataset:
    return Dataset(samples(program, count), {}, batch_size=count)


def values_of(program: Program, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Any values of a program, by running it with them as outputs."""
    clone = program.clone()
    made = {v.name: v for n in clone.graph for v in n.outputs} | {v.name: v for v in clone.graph.inputs}
    feeds = samples(program)
    fed = {n: feeds[n] for n in names if n in feeds}
    clone.graph.outputs[:] = [made[n] for n in names if n not in fed]
    found = session_of(clone)(feeds)
    return fed | dict(zip([n for n in names if n not in fed], found, strict=True))


def cosine(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    x, y = np.linalg.norm(a, axis=axis), np.linalg.norm(b, axis=axis)
    found = np.divide((a * b).sum(axis), x * y, out=np.zeros_like(x), where=x * y > 0)
    return np.where((x == 0) & (y == 0), 1.0, found)


def sizes(sets: Sequence[DropSet]) -> list[int]:
    return [len(s) for s in sets]


# -- whatever a rule proposes is legal ----------------------------------------------------------------


@pytest.mark.parametrize("rule", [r.name for r in RULES])
@pytest.mark.parametrize("net", list(NETS))
def test_every_set_is_the_program_with_those_branches_zero(net, rule):
    program = NETS[net]()
    try:
        sets = drop_sets(program, rule, data_of(program), threads=1)
    except PassError:
        assert rule == "greedy-perplexity"
        assert net != "classifier"
        return
    branches = find_branches(program).branches
    zeroing, feeds = session_of(switched(program, branches)), samples(program, 3, seed=1)
    may = {b.name for b in droppable(program)}
    assert len(set(sets)) == len(sets)
    for names in sets:
        assert set(names) <= may
        assert len(set(names)) == len(names)
        dropped = apply_drops(program, names)
        shown = {p.name for p in dropped.outputs}
        gone = {c for b in branches if b.name in names for c in (*b.cache_inputs, *b.cache_outputs)}
        ports = [p.name for p in (*program.inputs, *program.outputs)]
        assert [p.name for p in (*dropped.inputs, *dropped.outputs)] == [p for p in ports if p not in gone]
        wanted = zip(zeroing({**feeds, **keeping(branches, names)}), program.outputs, strict=True)
        expected = [w for w, p in wanted if p.name in shown]
        for got, want in zip(run(dropped, feeds), expected, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("net", list(NETS))
def test_rules_reach_every_droppable_branch(net):
    program = NETS[net]()
    names = {b.name for b in droppable(program)}
    for rule in ("joint-branch-drop", "greedy-output-divergence", "additive-unet-drop"):
        assert set(drop_sets(program, rule, data_of(program), threads=1)[-1]) == names


# -- what the formulas say ----------------------------------------------------------------------------


def similarities(program: Program) -> dict[str, float]:
    branches = find_branches(program).branches
    names = dict.fromkeys(v for b in branches for v in (b.skip, b.output))
    values = values_of(program, list(names))
    axis = {b.name: 1 if b.kind == "conv" else -1 for b in branches}
    return {b.name: float(cosine(values[b.skip], values[b.output], axis[b.name]).mean()) for b in branches}


@pytest.mark.parametrize("make", [transformer, encoder_decoder, resnet, unet])
def test_joint_branch_drop_is_one_list_by_similarity(make):
    program = make()
    similar = similarities(program)
    sets = drop_sets(program, "joint-branch-drop", data_of(program), threads=1)
    assert list(sets[-1]) == sorted(sets[-1], key=lambda n: -similar[n])
    assert sizes(sets) == list(range(1, len(droppable(program)) + 1))


def test_attention_first_leaves_others_until_all_attention_is_gone():
    program = encoder_decoder()
    kinds, similar = {b.name: b.kind for b in droppable(program)}, similarities(program)
    order = drop_sets(program, "attention-first", data_of(program), threads=1)[-1]
    attention = [n for n in order if kinds[n] == "attention"]
    assert list(order[: len(attention)]) == sorted(attention, key=lambda n: -similar[n])
    assert len(attention) == 6


def naive_greedy(program: Program, harm, count: int) -> list[DropSet]:
    names, chosen, found = [b.name for b in droppable(program)], (), []
    for _ in range(count):
        left = [n for n in names if n not in chosen]
        chosen = (*chosen, min(left, key=lambda n: harm([*chosen, n])))
        found.append(chosen)
    return found


@pytest.mark.parametrize("make", [transformer, resnet])
def test_greedy_output_divergence_is_the_naive_loop(make):
    program = make()
    branches, feeds = find_branches(program).branches, samples(program)
    zeroing = session_of(switched(program, branches))
    before = zeroing({**feeds, **keeping(branches, [])})[0]
    rows = len(before)

    def harm(names):
        after = zeroing({**feeds, **keeping(branches, names)})[0].astype(np.float64)
        change = np.square(after - before).reshape(rows, -1).sum(1)
        return np.sqrt(change.sum() / np.square(before.astype(np.float64)).sum())

    from lamina.quality import get_metric

    metric = get_metric("relative-l2", program)
    sets = drop_sets(program, "greedy-output-divergence", data_of(program), metric=metric, most=4, threads=1)
    assert sets == naive_greedy(program, harm, 4)


def test_greedy_perplexity_is_the_naive_loop():
    program = classifier()
    branches, feeds = find_branches(program).branches, samples(program)
    zeroing, ids = session_of(switched(program, branches)), feeds["input_ids"]

    def loss(names):
        logits = zeroing({**feeds, **keeping(branches, names)})[0].astype(np.float64)[:, :-1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.take_along_axis(log_p, ids[:, 1:, None], -1).mean()

    sets = drop_sets(program, "greedy-perplexity", data_of(program), threads=1)
    assert sets == naive_greedy(program, loss, 4)


def test_greedy_perplexity_without_a_task_says_so():
    program = transformer()
    with pytest.raises(PassError, match="needs next tokens or labels"):
        drop_sets(program, "greedy-perplexity", data_of(program), threads=1)


@pytest.mark.parametrize("make", [transformer, lambda: transformer(pre=False), encoder_decoder, resnet, unet])
def test_contiguous_block_drop_is_the_least_angle(make):
    program = make()
    layers = layers_of(program)
    values = values_of(program, list(dict.fromkeys(v for x in layers for v in (x.enters, x.leaves))))
    conv = all(b.kind == "conv" for b in droppable(program))

    def angle(first: int, last: int) -> float:
        a, b = values[layers[first].enters], values[layers[last].leaves]
        span = layers[first : last + 1]
        if a.shape != b.shape or len({x.stream for x in span}) > 1 or not all(x.whole for x in span):
            return np.inf
        similar = cosine(a, b, 1) if conv else cosine(a[:, -1], b[:, -1])
        return float(np.arccos(np.clip(similar, -1, 1)).mean() / np.pi)

    expected = []
    for count in range(1, len(layers) + 1):
        angles = [angle(i, i + count - 1) for i in range(len(layers) - count + 1)]
        if np.isfinite(min(angles)):
            first = int(np.argmin(angles))
            expected.append(tuple(n for x in layers[first : first + count] for n in x.branches))
    assert drop_sets(program, "contiguous-block-drop", data_of(program), threads=1) == expected
    assert expected


def test_static_skip_map_and_subgraph_drop_go_by_layer_similarity():
    program = encoder_decoder(3)
    layers = layers_of(program)
    values = values_of(program, list(dict.fromkeys(v for x in layers for v in (x.enters, x.leaves))))
    similar = {x.branches: cosine(values[x.enters], values[x.leaves]).mean() for x in layers}
    ordered = sorted(layers, key=lambda x: -similar[x.branches])
    sets = drop_sets(program, "static-skip-map", data_of(program), threads=1)
    assert sets == [tuple(n for x in ordered[: k + 1] for n in x.branches) for k in range(len(ordered))]
    parts = [[x for x in ordered if x.stream == s] for s in (0, 1)]
    expected = [tuple(n for x in p[: k + 1] for n in x.branches) for p in parts for k in range(len(p))]
    assert drop_sets(program, "subgraph-drop", data_of(program), threads=1) == expected
    assert all(n.startswith("enc.") for n in expected[2])
    assert all(n.startswith("dec.") for n in expected[5])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40))
def test_balanced_skip_is_even_and_spares_the_ends(count):
    layers = tuple(Layer(f"{i}", (f"{i}.a", f"{i}.b"), 0, "", "") for i in range(count))
    sets = list(balanced_skip(DropEvidence((), layers)))
    assert sizes(sets) == [2 * k for k in range(1, max(count - 1, 1))]
    for names in sets:
        at = sorted({int(n.partition(".")[0]) for n in names})
        assert at[0] >= 1
        assert at[-1] <= count - 2
        gaps = np.diff(at)
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 3)), min_size=1, max_size=9), st.booleans())
def test_additive_unet_drop_is_the_least_sum(rows, nest):
    names = [f"b{i}" for i in range(len(rows))]
    parents = ["b0" if nest and i == 1 else None for i in range(len(rows))]
    branches = tuple(Droppable(n, "conv", p, s) for n, p, (_, s) in zip(names, parents, rows, strict=True))
    harm = {n: h for n, (h, _) in zip(names, rows, strict=True)}
    saving = {b.name: b.saving for b in branches}
    sets = list(additive_unet_drop(DropEvidence(branches, damages=lambda: harm)))
    nested = len(rows) > 1 and nest
    total = sum(s for n, s in saving.items() if not (nested and n == "b1"))
    legal = [
        c
        for k in range(1, len(names) + 1)
        for c in itertools.combinations(names, k)
        if not (nested and {"b0", "b1"} <= set(c))
    ]
    for names_ in sets:
        assert not (nested and {"b0", "b1"} <= set(names_))
    for step in range(1, len(rows) + 1):
        least = total * step / len(rows) * (1 - 1e-6)
        best = min(sum(harm[n] for n in c) for c in legal if sum(saving[n] for n in c) >= least)
        mine = [sum(harm[n] for n in s) for s in sets if sum(saving[n] for n in s) >= least]
        assert min(mine) <= best + 1e-6 * (1 + len(rows)) * max(max(harm.values()), 1e-9)


def test_additive_unet_drop_reads_measured_damages():
    program = unet()
    branches, feeds = find_branches(program).branches, samples(program)
    zeroing = session_of(switched(program, branches))
    before = zeroing({**feeds, **keeping(branches, [])})[0].astype(np.float64)
    harm = {
        b.name: np.square(zeroing({**feeds, **keeping(branches, [b.name])})[0] - before).sum()
        for b in branches
    }
    alike = dict.fromkeys(harm, 1.0)
    from lamina.quality import get_metric

    metric = get_metric("relative-l2", program)
    sets = drop_sets(program, "additive-unet-drop", data_of(program), metric=metric, saving=alike, threads=1)
    order = sorted(harm, key=lambda n: harm[n])
    assert [set(s) for s in sets] == [set(order[: k + 1]) for k in range(len(order))]


# -- layers and streams -------------------------------------------------------------------------------


def test_streams_of_an_encoder_and_a_decoder_differ():
    layers = layers_of(encoder_decoder())
    assert [(x.branches[0].partition(".")[0], x.stream) for x in layers] == [
        ("enc", 0),
        ("enc", 0),
        ("dec", 1),
        ("dec", 1),
    ]


def test_a_projection_shortcut_stays_in_its_stream():
    assert {x.stream for x in layers_of(resnet())} == {0}


def test_balanced_skip_needs_no_data_and_the_others_say_so():
    program = transformer(4)
    assert drop_sets(program, "balanced-skip") == [
        ("l.2.attn", "l.2.mlp"),
        ("l.1.attn", "l.1.mlp", "l.2.attn", "l.2.mlp"),
    ]
    with pytest.raises(DataError, match="'joint-branch-drop' needs calibration samples"):
        drop_sets(program, "joint-branch-drop")
    with pytest.raises(BudgetError, match="no drop rule 'nonsense'"):
        get_rule("nonsense")


def interface_of(program: Program) -> Mapping[str, ir.DataType]:
    return {p.name: p.dtype for p in (*program.inputs, *program.outputs)}


@needs_reference
def test_rules_on_a_reference_model():
    """kwt1: 12 layers of attention and MLP; every rule's first sets run and keep the interface."""
    program = capture(str(models_dir / "kwt1_speech_commands.onnx"))
    port = program.inputs[0]
    shape = [8, *(d if isinstance(d, int) else 1 for d in port.shape[1:])]
    data = Dataset({port.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}, {}, 8)
    assert len(layers_of(program)) == 12
    for rule in RULES:
        if rule.greedy or rule.need == "damages":
            continue
        sets = drop_sets(program, rule, data, most=2, threads=1)
        assert bool(sets) == (rule.name != "subgraph-drop")
        for names in sets:
            dropped = apply_drops(program, names)
            assert interface_of(dropped) == interface_of(program)
            assert np.isfinite(run(dropped, data.inputs)[0]).all()
