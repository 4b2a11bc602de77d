"""One table of operators whose nodes no pass may merge, move, drop or evaluate early."""

from __future__ import annotations

import onnx_ir as ir

_RANDOM = "draws random numbers: two equal nodes give different values"
_CONTROL = "runs subgraphs: what it computes is decided at run time"
_STATE = "keeps or updates state outside its outputs"
_TRAINING = "trains: it computes gradients or updates weights"

# (domain, operator) -> why its nodes are fenced.
FENCED: dict[tuple[str, str], str] = {
    ("", "RandomNormal"): _RANDOM,
    ("", "RandomNormalLike"): _RANDOM,
    ("", "RandomUniform"): _RANDOM,
    ("", "RandomUniformLike"): _RANDOM,
    ("", "Bernoulli"): _RANDOM,
    ("", "Multinomial"): _RANDOM,
    ("com.microsoft", "Sampling"): _RANDOM,
    ("", "If"): _CONTROL,
    ("", "Loop"): _CONTROL,
    ("", "Scan"): _CONTROL,
    ("", "SequenceMap"): _CONTROL,
    ("com.microsoft", "BeamSearch"): _CONTROL,
    ("com.microsoft", "GreedySearch"): _CONTROL,
    ("com.microsoft", "WhisperBeamSearch"): _CONTROL,
    # With a shared buffer these write the new keys and values into their own past inputs.
    ("com.microsoft", "GroupQueryAttention"): _STATE,
    ("com.microsoft", "SparseAttention"): _STATE,
    ("com.microsoft", "PagedAttention"): _STATE,
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): _STATE,
    ("com.microsoft", "DecoderMaskedSelfAttention"): _STATE,
    ("com.microsoft", "DecoderAttention"): _STATE,
    ("ai.onnx.preview.training", "Gradient"): _TRAINING,
    ("ai.onnx.preview.training", "Adagrad"): _TRAINING,
    ("ai.onnx.preview.training", "Adam"): _TRAINING,
    ("ai.onnx.preview.training", "Momentum"): _TRAINING,
    ("com.microsoft", "BiasDropout"): _RANDOM,
    ("com.microsoft", "BitmaskDropout"): _RANDOM,
    ("com.microsoft", "BitmaskBiasDropout"): _RANDOM,
}


def why_fenced(node: ir.Node) -> str | None:
    """Why passes must leave ``node`` alone, or None when they need not."""
    if node.domain in ("", "ai.onnx"):
        if node.op_type == "Dropout" and _may_train(node):
            return "may drop elements at random: its training_mode input is not constantly false"
        if node.op_type == "BatchNormalization" and _normalizes_by_batch(node):
            return "is in training mode: it normalizes by the batch and updates its statistics"
        return FENCED.get(("", node.op_type))
    return FENCED.get((node.domain, node.op_type))


def is_fenced(node: ir.Node) -> bool:
    """Whether ``node`` is random, stateful, control flow or in training mode."""
    return why_fenced(node) is not None


def _may_train(node: ir.Node) -> bool:
    flag = node.inputs[2] if len(node.inputs) > 2 else None
    if flag is None:
        return False
    return flag.const_value is None or flag.is_graph_input() or bool(flag.const_value.numpy().any())


def _normalizes_by_batch(node: ir.Node) -> bool:
    mode = node.attributes.get("training_mode")
    return (mode is not None and mode.as_int() != 0) or sum(bool(v.name) for v in node.outputs) > 1
