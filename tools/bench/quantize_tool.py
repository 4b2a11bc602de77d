"""Quantize one model with one other tool in a process of its own; needs that tool, numpy and onnx.

    python tools/bench/quantize_tool.py TOOL IN SAMPLES.npz OUT

SAMPLES.npz: ``calibration.NAME`` and ``selection.NAME`` arrays of rows, ``metric`` and ``batch`` (see
:func:`tools.bench.peers.write_samples`). Nobody is given an option but the model, the samples and, where the
tool takes one, the metric: as its documentation shows it to a plain user. The 4-bit tools are told 4 bits in
blocks of 32, asymmetric where that is a switch and what comes out runs. Prints one JSON line: ``seconds`` of
quantizing, imports included; on failure exits 1 with the first line of the error as the last line on stderr.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Feeds = dict[str, np.ndarray]
Work = Callable[[str, "Samples", str], None]
BITS, BLOCK = 4, 32


class Samples:
    """Calibration batches, and the task's score of a model on selection samples."""

    def __init__(self, path: str) -> None:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        self.metric, self.batch = str(arrays.pop("metric")), int(arrays.pop("batch"))
        self.parts: dict[str, Feeds] = {"calibration": {}, "selection": {}}
        for key, rows in arrays.items():
            part, name = key.split(".", 1)
            self.parts[part][name] = rows

    def batches(self) -> list[Feeds]:
        """All calibration rows."""
        rows = self.parts["calibration"]
        count = len(next(iter(rows.values())))
        return [{k: r[i : i + self.batch] for k, r in rows.items()} for i in range(0, count, self.batch)]

    def score(self, model: str) -> float:
        """Higher is better, always positive: points, and for a loss its reciprocal."""
        sys.path.append(str(Path(__file__).resolve().parents[2]))
        from tools.bench import judge
        from tools.bench.cases import Case

        case = Case("", "", self.metric, dict, "", self.batch)
        value = judge.score(case, Path(model), self.parts["selection"])
        return 1 / value if self.metric == "cross-entropy" else value


class Reader:
    """Batches as readers of ONNX Runtime and its likes hand them out."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.rewind()

    def rewind(self) -> None:
        """From the first batch on again."""
        self.left = iter(self.samples.batches())

    def get_next(self) -> Feeds | None:
        """A batch, None after the last."""
        return next(self.left, None)

    def __iter__(self) -> Iterator[Feeds]:
        return self.left

    def __next__(self) -> Feeds:
        return next(self.left)


def nncf(source: str, samples: Samples, output: str) -> None:
    import nncf

    onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(samples.batches())), output)


def nncf_int4(source: str, samples: Samples, output: str) -> None:
    import nncf

    # without this, a reduction that the block does not divide is an error that recommends it
    more = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    mode, model = nncf.CompressWeightsMode.INT4_SYM, onnx.load(source)  # ASYM makes what does not load
    onnx.save(nncf.compress_weights(model, mode=mode, group_size=BLOCK, advanced_parameters=more), output)


def onnxsim(source: str, samples: Samples, output: str) -> None:
    import onnxsim

    onnx.save(onnxsim.quantize_static(source, samples.batches()), output)


def olive(kind: str, **options: Any) -> Work:
    """A workflow of one pass."""

    def work(source: str, samples: Samples, output: str) -> None:
        os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
        from olive import run
        from olive.data.registry import Registry

        # one row an item: Olive's own loader makes the batches
        rows = samples.parts["calibration"]
        items = [({k: r[i] for k, r in rows.items()}, 0) for i in range(len(next(iter(rows.values()))))]

        @Registry.register_dataset()
        def calibration_rows(**_: Any) -> list[tuple[Feeds, int]]:
            return items

        data = {
            "name": "calibration",
            "load_dataset_config": {"type": "calibration_rows"},
            "dataloader_config": {"batch_size": samples.batch},
        }
        wanted = {"data_config": "calibration"} if kind == "OnnxStaticQuantization" else {}
        with tempfile.TemporaryDirectory() as folder:
            config = {
                "input_model": {"type": "OnnxModel", "model_path": source},
                "data_configs": [data],
                "passes": {"quantize": {"type": kind, **wanted, **options}},
                "output_dir": f"{folder}/out",
                "cache_dir": f"{folder}/cache",
            }
            found = run(config).get_best_candidate()
            onnx.save(onnx.load(found.model_path), output)

    return work


def onc(approach: str) -> Work:
    """onnx-neural-compressor, the successor of neural-compressor's ONNX Runtime part, in 8 bits."""

    def work(source: str, samples: Samples, output: str) -> None:
        from onnx_neural_compressor.quantization import config, quantize

        how = (
            config.DynamicQuantConfig()
            if approach == "dynamic"
            else config.StaticQuantConfig(Reader(samples))
        )
        with tempfile.TemporaryDirectory() as folder:  # it writes weights to a second file
            quantize(source, f"{folder}/model.onnx", how)
            onnx.save(onnx.load(f"{folder}/model.onnx"), output)

    return work


def onc_tuned(source: str, samples: Samples, output: str) -> None:
    """Its autotune over everything it can vary, stopping where the metric falls by less than its 1 %."""
    from onnx_neural_compressor.quantization import config, tuning

    sets = config.StaticQuantConfig.get_config_set_for_tuning()
    tune = tuning.TuningConfig(config_set=sets)
    onnx.save(
        tuning.autotune(source, tune, samples.score, calibration_data_reader=Reader(samples)),
        output,
    )


def onc_blocks(algorithm: str) -> Work:
    def work(source: str, samples: Samples, output: str) -> None:
        from onnx_neural_compressor.quantization import matmul_nbits_quantizer as tool

        how = getattr(tool, f"{algorithm}WeightOnlyQuantConfig")
        algo = how() if algorithm == "RTN" else how(Reader(samples))
        made = tool.MatMulNBitsQuantizer(source, n_bits=BITS, block_size=BLOCK, algo_config=algo)
        made.process()
        onnx.save(getattr(made.model, "model", made.model), output)

    return work


def inc(approach: str, tuned: bool = False, **options: Any) -> Work:
    """neural-compressor 2.x; ``tuned``: given the metric it looks for what keeps 99 % of it."""

    def work(source: str, samples: Samples, output: str) -> None:
        from neural_compressor import PostTrainingQuantConfig, quantization

        class Loader:
            batch_size = samples.batch

            def __iter__(self) -> Iterator[tuple[Feeds, int]]:
                return ((feeds, 0) for feeds in samples.batches())

        def score(model: Any) -> float:
            with tempfile.TemporaryDirectory() as folder:
                path = f"{folder}/model.onnx"
                onnx.save(getattr(model, "model", model), path)
                return samples.score(path)

        said = _Errors()
        logging.getLogger("neural_compressor").addHandler(said)
        with tempfile.TemporaryDirectory() as folder:
            made = quantization.fit(
                _without_shapes_of_weights(source, Path(folder)),
                PostTrainingQuantConfig(approach=approach, **options),
                calib_dataloader=None if approach == "dynamic" else Loader(),
                eval_func=score if tuned else None,
            )
            if made is None:
                raise RuntimeError(said.first or "no model returned")
            made.save(output)

    return work


def _without_shapes_of_weights(source: str, folder: Path) -> str:
    """The model without value_info of its weights, as torch's exporter writes it.

    The tool transposes weights of Gemm under the same name, and fails where their old shape is written down.
    """
    model = onnx.load(source)
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.save(model, folder / "model.onnx")
    return str(folder / "model.onnx")


def inc_blocks(algorithm: str) -> Work:
    weight = {
        "bits": BITS,
        "group_size": BLOCK,
        "scheme": "asym",
        "algorithm": algorithm,
    }
    return inc("weight_only", op_type_dict={".*": {"weight": weight}})


class _Errors(logging.Handler):
    """The first error a tool logs and goes on from."""

    first = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR and not self.first:
            self.first = record.getMessage().splitlines()[0]


# name -> (distribution it comes in, how); 8 bits, then 4.
TOOLS: dict[str, tuple[str, Work]] = {
    "nncf": ("nncf", nncf),
    "onnxsim": ("onnxsim", onnxsim),
    "olive-dynamic": ("olive-ai", olive("OnnxDynamicQuantization")),
    "olive-static": ("olive-ai", olive("OnnxStaticQuantization")),
    "onc-dynamic": ("onnx-neural-compressor", onc("dynamic")),
    "onc-static": ("onnx-neural-compressor", onc("static")),
    "onc-tuned": ("onnx-neural-compressor", onc_tuned),
    "inc-dynamic": ("neural-compressor", inc("dynamic")),
    "inc-static": ("neural-compressor", inc("static")),
    "inc-tuned": ("neural-compressor", inc("static", tuned=True)),
}
BLOCK_TOOLS: dict[str, tuple[str, Work]] = {
    "olive-rtn": (
        "olive-ai",
        olive("OnnxBlockWiseRtnQuantization", block_size=BLOCK, is_symmetric=False),
    ),
    "olive-hqq": ("olive-ai", olive("OnnxHqqQuantization", block_size=BLOCK)),
    "olive-kquant": ("olive-ai", olive("OnnxKQuantQuantization", block_size=BLOCK)),
    "onc-rtn": ("onnx-neural-compressor", onc_blocks("RTN")),
    "onc-gptq": ("onnx-neural-compressor", onc_blocks("GPTQ")),
    "onc-awq": ("onnx-neural-compressor", onc_blocks("AWQ")),
    "inc-rtn": ("neural-compressor", inc_blocks("RTN")),
    "inc-gptq": ("neural-compressor", inc_blocks("GPTQ")),
    "inc-awq": ("neural-compressor", inc_blocks("AWQ")),
    "nncf-int4": ("nncf", nncf_int4),
}


def main() -> None:
    tool, source, samples, output = sys.argv[1:5]
    distribution, work = {**TOOLS, **BLOCK_TOOLS}[tool]
    start = time.perf_counter()
    try:
        work(source, Samples(samples), output)
    except Exception as error:  # a tool's failure is a finding, said in one line
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        sys.exit(f"{type(error).__name__}: {lines[0]}")
    print(json.dumps({"seconds": time.perf_counter() - start, "version": version(distribution)}))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: a tool named like a file in it must not be found here
    main()
