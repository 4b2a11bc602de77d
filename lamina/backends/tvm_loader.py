"""Run the compiled model beside this file; needs numpy and TVM's runtime (pip install apache-tvm).

python run_tvm.py --inputs feeds.npz --outputs outputs.npz [--threads 2] [--time 50]

In Python: ``Library("folder/model.so").run({"x": array})``. The library is machine code for the CPU named in
model.so.json; where another CPU lacks its instructions it does not run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np


class Library:
    """A compiled model, loaded.

    Args:
        path: The ``model.so``; its interface is read from ``model.so.json``.
        threads: Threads to run with, by default those it was compiled for; a process's first load decides.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        path = Path(path).resolve()
        self.interface = read_interface(path)
        configure(self.interface, threads)
        import tvm.runtime
        from tvm.runtime.vm import VirtualMachine

        self._tensor = tvm.runtime.tensor
        self._main = VirtualMachine(tvm.runtime.load_module(str(path)), tvm.runtime.cpu())["main"]
        self.input_names = [port["name"] for port in self.interface["inputs"]]
        self.output_names: list[str] = self.interface["outputs"]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays keyed by output name.

        Raises:
            ValueError: The feeds do not fit the interface.
        """
        self.check(feeds)
        return self.fetch(self._main(*self.tensors(feeds)))

    def check(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Raise unless names, dtypes and shapes fit: the compiled code does not look.

        Raises:
            ValueError: They do not.
        """
        if set(feeds) != set(self.input_names):
            raise ValueError(f"the inputs are {self.input_names}, got {sorted(feeds)}")
        limit = self.interface["limit"]
        for port in self.interface["inputs"]:
            array, name = np.asarray(feeds[port["name"]]), port["name"]
            if str(array.dtype) != port["dtype"]:
                raise ValueError(f"input '{name}' is {array.dtype}, the model takes {port['dtype']}")
            if len(array.shape) != len(port["shape"]):
                raise ValueError(f"input '{name}' has shape {array.shape}, the model takes {port['shape']}")
            for have, want in zip(array.shape, port["shape"]):  # noqa: B905  lengths were compared
                if have != want if isinstance(want, int) else limit is not None and have > limit:
                    raise ValueError(
                        f"input '{name}' has shape {array.shape}, the model takes {port['shape']}"
                        + ("" if limit is None else f", open dims at most {limit}")
                    )

    def tensors(self, feeds: Mapping[str, np.ndarray]) -> list[Any]:
        """The feeds as TVM tensors, in the order of the inputs."""
        arrays = [np.asarray(feeds[name]) for name in self.input_names]
        # trap: ascontiguousarray turns a scalar into one element
        return [self._tensor(np.ascontiguousarray(a).reshape(a.shape)) for a in arrays]

    def call(self, tensors: Sequence[Any]) -> Any:
        """Run on tensors and leave the result in TVM's memory."""
        return self._main(*tensors)

    def fetch(self, result: Any) -> dict[str, np.ndarray]:
        """What a call returned, as arrays."""
        values = [result] if len(self.output_names) == 1 else list(result)
        return dict(zip(self.output_names, map(_array, values)))  # noqa: B905  3.9 runs this file too


def read_interface(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What lies in ``<path>.json``."""
    interface: dict[str, Any] = json.loads(Path(f"{path}.json").read_text())
    return interface


def configure(interface: Mapping[str, Any], threads: int | None = None) -> None:
    """Set what TVM reads once, when it is imported."""
    if threads is not None:
        os.environ["TVM_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TVM_NUM_THREADS", str(interface["threads"]))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    if interface["runtime_only"]:
        os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")  # 0.1 GB less than the compiler's library


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "numpy"):
        array: np.ndarray = value.numpy()
        return array
    return np.array([int(v) for v in value], np.int64)  # a shape that is an output


def main() -> None:
    """Run a file of feeds, write a file of outputs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", default=Path(__file__).with_name("model.so"), type=Path)
    parser.add_argument("--inputs", required=True, help=".npz with one array an input")
    parser.add_argument("--outputs", help=".npz to write")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--time", type=int, default=0, metavar="RUNS", help="also print the median of so many runs"
    )
    asked = parser.parse_args()
    library = Library(asked.library, asked.threads)
    with np.load(asked.inputs, allow_pickle=False) as archive:
        feeds = {name: archive[name] for name in library.input_names if name in archive}
    outputs = library.run(feeds)
    for name, array in outputs.items():
        print(f"{name}: {array.dtype}{list(array.shape)}")
    if asked.outputs:
        np.savez(asked.outputs, **cast(Any, outputs))
    if asked.time:
        samples = []
        for _ in range(asked.time):
            start = time.perf_counter()
            library.run(feeds)
            samples.append(time.perf_counter() - start)
        print(f"median of {asked.time} runs: {float(np.median(samples)) * 1000:.3f} ms")


if __name__ == "__main__":
    main()
