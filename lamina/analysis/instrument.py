"""Run a program with intermediate values as extra outputs, its weights shared with the original."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.data import Dataset
from lamina.errors import BackendError, DataError, LaminaError
from lamina.ir.io import save_model
from lamina.ir.program import Program

# Shape inference reads small constants, so only larger ones leave the serialized model.
_INLINE_BYTES = 1024


def available_threads() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class InstrumentedSession:
    """A CPU session that also returns intermediate values.

    Large weights are handed to ONNX Runtime as the program's own (possibly memory-mapped) bytes: they are not
    serialized, so the 2 GB limit of the format does not apply and only the session copies them.

    Args:
        program: Left unchanged; a clone carries the extra outputs.
        values: Names of values of the main graph to make readable.
        threads: Intra-operator threads; all available cores when None.
        faithful: Forbid fusions that compute in fewer bits than the program says.
        configure: Called with the session options before the session is made.
        own: The program is nobody else's and may be changed; saves the clone.

    Raises:
        DataError: A name in ``values`` is no value of the main graph.
        BackendError: ONNX Runtime refuses the program.
    """

    def __init__(
        self,
        program: Program,
        values: Iterable[str] = (),
        *,
        threads: int | None = None,
        faithful: bool = True,
        configure: Callable[[Any], None] | None = None,
        own: bool = False,
    ) -> None:
        import onnxruntime as ort

        model = program.model if own else program.model.clone()
        add_outputs(model, values, program.source)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or available_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if faithful:
            # trap: a dequantized weight and its MatMul fuse into a kernel that rounds activations to 8 bits.
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if configure is not None:
            configure(options)
        ort.set_default_logger_severity(4)
        try:
            self.session = _open(model, options)
        except LaminaError:
            raise
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime refuses the program: {_first_line(error)}", where=program.source
            ) from error
        self._source = program.source
        self._run_options = ort.RunOptions()
        self._run_options.only_execute_path_to_fetches = True

    def run(self, names: Sequence[str], feeds: Mapping[str, np.ndarray], *, where: str = "") -> list[Any]:
        """Run once and return the values called ``names``; nodes they do not need are left out.

        Raises:
            DataError: ONNX Runtime refuses the feeds (names, shapes, dtypes, index ranges).
        """
        try:
            return list(self.session.run(list(names), dict(feeds), self._run_options))
        except Exception as error:
            raise DataError(
                f"the program cannot run on these inputs: {_first_line(error)}",
                where=where or self._source,
                advice="check names, shapes and dtypes of the data against the model's inputs",
            ) from error


def feeds_of(program: Program, batch: Dataset, where: str = "") -> dict[str, np.ndarray]:
    """The program's inputs taken from ``batch``.

    Raises:
        DataError: An input is missing, of another dtype, or not finite.
    """
    feeds = {}
    for port in program.inputs:
        if port.name not in batch.inputs:
            have = ", ".join(sorted(batch.inputs)) or "none"
            advice = f"the data has {have}"
            raise DataError(f"the data has no input '{port.name}'", where=where or None, advice=advice)
        array = np.ascontiguousarray(batch.inputs[port.name])
        if array.dtype != port.numpy_dtype and array.dtype.kind != "U":
            advice = f"give an array of {port.numpy_dtype}"
            raise DataError(
                f"input '{port.name}' is {array.dtype}, the model wants {port.numpy_dtype}",
                where=where or None,
                advice=advice,
            )
        require_finite(f"input '{port.name}'", array, where)
        feeds[port.name] = array
    return feeds


def require_finite(label: str, array: np.ndarray, where: str = "") -> None:
    """Raise unless every element of a floating ``array`` is finite.

    Raises:
        DataError: There is a NaN or an infinity; names ``label`` and how many.
    """
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        return
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        kind = "NaN" if bool(np.isnan(array).any()) else "infinite"
        raise DataError(
            f"{label} has {bad} values that are NaN or infinite (first kind seen: {kind})",
            where=where or None,
            advice="remove the samples that cause it, or fix the model",
        )


def fixed_batch(program: Program) -> int | None:
    """The batch size the program insists on: the constant first dim that all its inputs share, or None."""
    firsts = {port.shape[0] for port in program.inputs if port.shape}
    only = next(iter(firsts)) if len(firsts) == 1 else None
    return only if isinstance(only, int) and only > 0 else None


def add_outputs(model: ir.Model, names: Iterable[str], source: str) -> None:
    """Make values of the main graph outputs of ``model``.

    Raises:
        DataError: A name is no value of the main graph.
    """
    graph = model.graph
    known = {v.name: v for node in graph for v in node.outputs if v.name}
    present = {v.name for v in graph.outputs}
    fed = {v.name for v in graph.inputs} | set(graph.initializers)
    for name in names:
        if name in present or name in fed:
            continue
        if name not in known:
            raise DataError(
                f"no value is called '{name}'",
                where=source,
                advice="only values of the main graph can be observed",
            )
        present.add(name)
        graph.outputs.append(known[name])


def _open(model: ir.Model, options: Any) -> Any:
    """A session that shares the model's weights with this process where the runtime can."""
    import onnxruntime as ort

    providers = ["CPUExecutionProvider"]
    if not hasattr(options, "add_external_initializers_from_files_in_memory"):  # before ONNX Runtime 1.24
        with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
            files = save_model(model, Path(folder) / "model.onnx")
            return ort.InferenceSession(str(files[0]), options, providers=providers)
    serialized, weights = _serialize(model)
    # trap: add_initializer() gives the weights too, but the Conv fusions look for the file all the same.
    options.add_external_initializers_from_files_in_memory(
        list(weights), list(weights.values()), [w.nbytes for w in weights.values()]
    )
    return ort.InferenceSession(serialized, options, providers=providers)


def _serialize(model: ir.Model) -> tuple[bytes, dict[str, np.ndarray]]:
    """The model without its large weights, and their bytes by the name of the file they pretend to be in."""
    files: dict[str, np.ndarray] = {}
    for value in [v for graph in model.graphs() for v in graph.initializers.values()]:
        name, tensor = value.name or "", value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        if tensor.nbytes > _INLINE_BYTES and tensor.dtype.bitwidth >= 8:
            file = f"weight_{len(files)}"
            files[file] = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
            value.const_value = ir.ExternalTensor(
                file, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
    try:
        return ir.to_proto(model).SerializeToString(), files
    except ValueError as error:
        raise LaminaError(f"the program cannot be serialized: {error}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
