"""Names of a GraphModule's parameters and buffers, and which initializers are parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import torch

# Where an operator has its weights: input positions. A statistic (mean and variance of BatchNormalization), a
# scale of a quantizer, a bound of Clip is none.
WEIGHT_INPUTS: dict[str, tuple[int, ...]] = {
    "Add": (0, 1),
    "Attention": (0, 1, 2),
    "BatchNormalization": (1, 2),
    "Concat": tuple(range(64)),  # class tokens, joined parts of a weight
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "DeformConv": (1, 3),
    "Einsum": tuple(range(8)),
    "GRU": (1, 2, 3, 5),
    "Gather": (0,),
    "Gemm": (0, 1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LSTM": (1, 2, 3, 5, 6, 7),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "Mul": (0, 1),
    "PRelu": (1,),
    "RMSNormalization": (1,),
    "RNN": (1, 2, 3, 5),
    "Sub": (0, 1),
}
# What hands a weight on.
_PASSING = frozenset(
    {"Cast", "Expand", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
# Of these a single number is a constant of the formula (an epsilon, 1/sqrt(d)), not a weight.
_ELEMENTWISE = frozenset({"Add", "Mul", "Sub", "Concat", "Gather"})


def is_weight(value: ir.Value) -> bool:
    """Whether an initializer is floating and read where an operator has its weights, reshapes in between."""
    tensor = value.const_value
    if tensor is None or not tensor.dtype.is_floating_point():
        return False
    waiting, seen = [value], {value}
    while waiting:
        for node, position in waiting.pop().uses():
            if position in WEIGHT_INPUTS.get(node.op_type, ()) and not node.domain:
                if tensor.size > 1 or node.op_type not in _ELEMENTWISE:
                    return True
            elif node.op_type in _PASSING and position == 0:
                fresh = [v for v in node.outputs if v not in seen]
                seen.update(fresh)
                waiting += fresh
    return False


def attribute_names(names: Iterable[str]) -> dict[str, str]:
    """Initializer name -> dotted attribute path, unique; equal to the name where that can be.

    Dots, slashes and colons make submodules. Characters an attribute cannot have become ``_``, and a leading
    digit of the first part gets ``_`` before it; a part that a module needs itself gets ``_`` behind it, and
    a name that is taken, or would be both a tensor and a submodule, a number.
    """
    taken: set[str] = set()
    folders: set[str] = set()
    made: dict[str, str] = {}
    for name in names:
        base = _path(name)
        path, i = base, 0
        while path in taken or path in folders or any(p in taken for p in _parents(path)):
            i += 1
            path = f"{base.replace('.', '_')}_{i}"
        taken.add(path)
        folders.update(_parents(path))
        made[name] = path
    return made


def _path(name: str) -> str:
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII) for part in re.split(r"[./:]+", name) if part]
    parts = parts or ["initializer"]
    if parts[0][0].isdigit():
        parts[0] = f"_{parts[0]}"
    # trap: a weight called "forward" or "training" would replace what the module has under that name
    return ".".join(f"{p}_" if _is_reserved(p) else p for p in parts)


def _is_reserved(part: str) -> bool:
    return hasattr(torch.fx.GraphModule, part) or part in vars(torch.nn.Module()) or part in _OWN


_OWN = frozenset({"graph", "meta", "code", "training", "_modules", "_parameters", "_buffers"})


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def literal(tensor: ir.TensorProtocol) -> list[int] | list[float]:
    """Its elements as Python numbers."""
    return np.asarray(tensor.numpy()).flatten().tolist()
