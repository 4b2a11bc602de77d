"""What caches in 8 bits do to a trained decoder: ``python -m tools.studies.precision.caches [--rows N]``.

stories260k has no caches: here its keys and values are joined to interface inputs, and its rotary tables and
mask are cut at the right token. Then text is decoded, a prompt of half of it and after that token by token,
the caches handed on, in float32 and with caches in codes; weights and arithmetic stay float32. Printed: loss
of the next token over the steps behind the prompt, mean divergence from float32, bytes of all caches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lamina.backends.reference import compile_reference
from lamina.data import Dataset
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.quantize.cache_edits import expose_caches, quantize_caches
from lamina.passes.quantize.caches import calibrate_caches
from tools.bench.cases import ROOT

TOKENS = 256
CALIBRATION = 32
REPORT = 384  # first row of the report samples
HEADS, SIZE = 4, 8


def cached_stories() -> Program:
    """stories260k with caches: tokens and past keys and values in, logits and present ones out."""
    program = capture(ROOT / "models" / "stories260k.onnx").clone()
    rewriter, graph = Rewriter(program.model), program.model.graph
    pasts, presents = [], []
    # keys and values are repeated for their groups of queries: Unsqueeze, Expand
    repeated = [n for n in graph if n.op_type == "Expand" and n.inputs[0].producer().op_type == "Unsqueeze"]
    for index, expand in enumerate(repeated):
        fresh = expand.inputs[0].producer().inputs[0]
        name = f"{index // 2}.{('key', 'value')[index % 2]}"
        past = ir.Value(
            name=f"past.{name}",
            shape=ir.Shape(["batch", HEADS, "past", SIZE]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        graph.inputs.append(past)
        readers = [use.node for use in fresh.uses()]
        rewriter.at(next(n for n in graph if n in readers))
        whole = rewriter.op("Concat", [past, fresh], {"axis": 2}, name=f"join.{name}", dtype=past.dtype)
        rewriter.replace_uses(fresh, whole, keep=[whole.producer()])
        whole.name, whole.shape = f"present.{name}", ir.Shape(["batch", HEADS, "all", SIZE])
        pasts.append(past)
        presents.append(whole)
    first = next(n for n in graph if n.op_type == "Slice")
    rewriter.at(first)
    start = rewriter.op("Shape", [pasts[0]], {"start": 2, "end": 3}, dtype=ir.DataType.INT64)
    stop = rewriter.op("Add", [start, first.inputs[2]], dtype=ir.DataType.INT64)
    tables = [n for n in graph if n.op_type == "Slice" and n.inputs[0].is_initializer()]
    assert len(tables) == 3, "the rotary tables and the mask"
    for node in tables:
        node.replace_input_with(1, start)
        node.replace_input_with(2, stop)
        for use in node.outputs[0].uses():
            if use.node.op_type == "Slice" and node.inputs[0].name == "mask":
                use.node.replace_input_with(2, stop)
    graph.outputs.extend(presents)
    return program.with_model(program.model)


def decode(program: Program, tokens: np.ndarray, prompt: int) -> tuple[np.ndarray, int]:
    """Log probabilities ``[rows, steps, words]`` of what follows each token from the prompt's last on."""
    executable, found, state = compile_reference(program.model), [], dict[str, np.ndarray]()
    for port in program.inputs:
        if port.name.startswith("past"):
            state[port.name] = np.zeros((len(tokens), HEADS, 0, SIZE), port.numpy_dtype)
    for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, tokens.shape[1] - 1))]:
        outputs: Mapping[str, np.ndarray] = executable.run({"tokens": tokens[:, begin:end], **state})
        logits = outputs["logits"][:, -1].astype(np.float64)
        state = {n.replace("present", "past"): a for n, a in outputs.items() if n != "logits"}
        top = logits.max(axis=-1, keepdims=True)
        found.append(logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))
    return np.stack(found, axis=1), sum(a.nbytes for a in state.values())


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    rows = parser.parse_args().rows
    tokens = np.load(ROOT / "sets" / "tinystories_tok512_758x512.npz")["tokens"].astype(np.int64)[:, :TOKENS]
    program = cached_stories()
    empty = np.zeros((CALIBRATION, HEADS, 0, SIZE), np.float32)
    feeds = {p.name: empty for p in program.inputs if p.name != "tokens"}
    caches = calibrate_caches(program, Dataset({"tokens": tokens[:CALIBRATION], **feeds}, {}))
    coded = expose_caches(quantize_caches(program, caches), caches)
    text, prompt = tokens[REPORT : REPORT + rows], TOKENS // 2
    following = text[:, prompt:, None]
    one, large = decode(program, text, prompt)
    two, small = decode(coded, text, prompt)
    # the whole text at once must give what the steps give, or the caches are wrong
    plain = compile_reference(capture(ROOT / "models" / "stories260k.onnx").model)
    whole = plain.run({"tokens": text})["logits"][:, prompt - 1 : -1].astype(np.float64)
    whole -= np.log(np.exp(whole).sum(axis=-1, keepdims=True))
    print(
        json.dumps(
            {
                "rows": rows,
                "predictions": int(following.size),
                "steps_against_whole_text": float(np.abs(one - whole).max()),
                "loss_float32": float(-np.take_along_axis(one, following, -1).mean()),
                "loss_8_bits": float(-np.take_along_axis(two, following, -1).mean()),
                "divergence_nats": float((np.exp(one) * (one - two)).sum(axis=-1).mean()),
                "same_top_word": float((one.argmax(-1) == two.argmax(-1)).mean()),
                "cache_bytes": [large, small],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
