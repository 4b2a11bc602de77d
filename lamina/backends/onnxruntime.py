"""ONNX Runtime on the CPU: ``ort:cpu?threads=N[&opt=all|extended|basic|disabled][&spin=0|1]``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lamina.backends import _session
from lamina.backends.backend import Audit, Case, Feeds, Latency, Target, Workload
from lamina.errors import BackendError, BudgetError
from lamina.ir.message import message
from lamina.ir.names import every_graph

if TYPE_CHECKING:
    from lamina.backends.measure import IsolatedTimer

# protobuf's limit is 2 GiB for the whole message; the graph itself needs room too
IN_MEMORY_BYTES = 2**31 - 2**26
_OPTIONS = {"opt": tuple(_session.LEVELS), "spin": ("0", "1")}


class OrtExecutable:
    """A session, ready to run in this process.

    Attributes:
        input_names: Names of the inputs, in order.
        output_names: Names of the outputs, in order.
    """

    def __init__(self, session: Any, where: str) -> None:
        self._session = session
        self._where = where
        self._errors = _session.runtime_errors()
        self.input_names = tuple(i.name for i in session.get_inputs())
        self.output_names = tuple(o.name for o in session.get_outputs())

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once; arrays keyed by output name.

        Raises:
            BackendError: The feeds do not fit, or an operator failed (named where the runtime says).
        """
        return self.run_outputs(self.output_names, feeds)

    def run_outputs(self, names: Sequence[str], feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once for some outputs only; arrays keyed by output name.

        Raises:
            BackendError: The feeds do not fit, or an operator failed.
        """
        extra = [name for name in feeds if name not in self.input_names]
        missing = [name for name in self.input_names if name not in feeds]
        if extra or missing:
            raise BackendError(
                f"feeds do not fit {self._where}: missing {missing or 'none'}, unknown {extra or 'none'}",
                advice=f"the inputs are: {', '.join(self.input_names)}",
            )
        try:
            arrays = _session.run_session(self._session, names, feeds)
        except self._errors as error:
            raise _failure(f"{self._where} failed while running", error) from error
        return dict(zip(names, arrays, strict=True))


class OnnxRuntime:
    """The backend ``ort``: CPU execution provider only."""

    name = "ort"

    def check(self, target: Target) -> None:
        """Raise unless ``target`` has a device and options this backend knows.

        Raises:
            BudgetError: Unknown device, option or option value.
        """
        if target.device != "cpu":
            raise BudgetError(
                f"target '{target}': backend ort has no device '{target.device}'",
                advice="write it like ort:cpu?threads=2",
            )
        for key, value in target.options.items():
            allowed = _OPTIONS.get(key)
            if allowed is None or value not in allowed:
                wanted = "; ".join(f"{k}={'|'.join(v)}" for k, v in _OPTIONS.items())
                raise BudgetError(
                    f"target '{target}': backend ort does not know {key}={value}",
                    advice=f"its options are threads=N; {wanted}",
                )

    def compile(self, model: ir.Model | Path | bytes, target: Target) -> OrtExecutable:
        """Compile for running in this process; ``bytes`` are a serialized model.

        Raises:
            BackendError: ONNX Runtime refuses the model; names the operator where it can.
            BudgetError: The target is not one of this backend's.
        """
        return self.compile_with(model, target, None)

    def compile_with(
        self, model: ir.Model | Path | bytes, target: Target, optimized: Path | None
    ) -> OrtExecutable:
        """Compile; where ``optimized`` is given, also write the runtime's own optimized graph there."""
        self.check(target)
        options = session_options(target)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
            )
        name = model.graph.name if isinstance(model, ir.Model) else None
        where = f"model '{model}'" if isinstance(model, Path) else f"model '{name or 'main'}'"
        try:
            return OrtExecutable(_open(model, options), where)
        except _session.runtime_errors() as error:
            raise _failure(f"ONNX Runtime refuses {where}", error) from error

    def capabilities(self, target: Target) -> Mapping[str, Any]:
        """What the device is and which forms it really has kernels for; see :mod:`.ort_probe`."""
        from lamina.backends.ort_probe import probe

        self.check(target)
        return probe(target.options.get("opt", "all"))

    def draft(self, target: Target) -> Target:
        """Candidates are compared on the target itself."""
        return target

    def measure(
        self, models: Sequence[Path], target: Target, workload: Workload, *, seconds: float
    ) -> list[list[Latency]]:
        """Latency of each model on each case, in alternation, each model in a process of its own."""
        from lamina.backends.measure import measure

        self.check(target)
        return measure(models, target, workload, seconds)

    def timer(self, target: Target, workload: Workload, *, seed: int = 0) -> IsolatedTimer:
        """A timer that keeps a worker process a model, so that models can join and leave."""
        from lamina.backends.measure import IsolatedTimer

        self.check(target)
        return IsolatedTimer(target, workload, seed=seed)

    def peak_memory(self, model: Path, target: Target, case: Case) -> int:
        """Peak resident bytes a fresh process adds to load the model and run ``case``."""
        from lamina.backends.measure import peak_memory

        self.check(target)
        return peak_memory(model, target, case)

    def audit(self, model: ir.Model, target: Target, planned: Mapping[str, str] | None = None) -> Audit:
        """Compile, then read off the optimized graph which kernels really run; see :mod:`.ort_audit`.

        Args:
            model: The model as it would be deployed.
            target: Where.
            planned: Name of a weighted node -> name of the option it was given.
        """
        from lamina.backends.ort_audit import audit

        return audit(self, model, target, planned or {})

    def package(self, model: ir.Model, target: Target, directory: Path) -> list[Path]:
        """Write ``session.json``: the session options the measured latency holds for."""
        self.check(target)
        path = directory / "session.json"
        text = {
            "providers": ["CPUExecutionProvider"],
            "intra_op_num_threads": target.threads,
            "inter_op_num_threads": 1,
            "graph_optimization_level": _session.LEVELS[target.options.get("opt", "all")],
            "session_config": _entries(target),
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(text, indent=1) + "\n")
        partial.replace(path)
        return [path]


def session_options(target: Target) -> Any:
    """ONNX Runtime's SessionOptions for ``target``."""
    return _session.make_options(
        target.threads, level=target.options.get("opt", "all"), spin=target.options.get("spin")
    )


def serialize(model: ir.Model) -> bytes | None:
    """The model as one message with its weights inside; None where it is too large for one."""
    if weight_bytes(model) > IN_MEMORY_BYTES:
        return None
    whole = model
    if any(isinstance(v.const_value, ir.ExternalTensor) for v in _initializers(model)):
        whole = ir.external_data.load_to_model(model.clone())
    data: bytes = message(whole).SerializeToString()
    return data


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included."""
    return sum(v.const_value.nbytes for v in _initializers(model) if v.const_value is not None)


def _initializers(model: ir.Model) -> list[ir.Value]:
    return [v for graph in every_graph(model.graph) for v in graph.initializers.values()]


def _open(model: ir.Model | Path | bytes, options: Any) -> Any:
    if not isinstance(model, ir.Model):
        return _session.make_session(model, options)
    data = serialize(model)
    if data is not None:
        return _session.make_session(data, options)
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        return _session.make_session(path, options)


def _entries(target: Target) -> dict[str, str]:
    spin = target.options.get("spin")
    return {} if spin is None else {"session.intra_op.allow_spinning": spin}


def _failure(what: str, error: BaseException) -> BackendError:
    text, place = _session.explain(error)
    return BackendError(f"{what}: {text}", where=place)
