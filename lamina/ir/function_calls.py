"""What inlining a model's functions would come to, counted before anybody does it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from lamina.errors import CaptureError

_MOST = (
    2_000_000  # nodes; a model of 100 kB whose functions call each other twice can stand for 2 to the 1000
)
_ADVICE = "the model is invalid: export it again without functions, or check it with onnx.checker"


def check_calls(model: ir.Model, source: str) -> None:
    """Refuse functions that call themselves, and those that would inline to an absurd number of nodes.

    Raises:
        CaptureError: Naming the function.
    """
    sizes: dict[ir.OperatorIdentifier, int] = {}
    for start in model.functions:
        _measure(model, start, sizes, source)
    total = sum(sizes.get(n.op_identifier(), 1) for n in model.graph.all_nodes())
    if total > _MOST:
        raise CaptureError(
            f"the model's functions stand for {total:,} nodes, more than {_MOST:,}",
            where=source,
            advice=_ADVICE,
        )


def _measure(
    model: ir.Model, start: ir.OperatorIdentifier, sizes: dict[ir.OperatorIdentifier, int], source: str
) -> None:
    """Fill in how many nodes a call of ``start``, and of each function it calls, becomes."""
    open_calls: dict[ir.OperatorIdentifier, Iterator[ir.OperatorIdentifier]] = {}
    pending = [start]
    while pending:
        name = pending[-1]
        if name in sizes:
            pending.pop()
            continue
        if name not in open_calls:
            open_calls[name] = iter(_called(model, name))
        inner = next((c for c in open_calls[name] if c not in sizes), None)
        if inner is None:
            nodes = model.functions[name].all_nodes()
            sizes[name] = sum(sizes.get(n.op_identifier(), 1) for n in nodes)
            pending.pop()
        elif inner in open_calls:
            raise CaptureError(f"function '{inner[1]}' calls itself", where=source, advice=_ADVICE)
        else:
            pending.append(inner)


def _called(model: ir.Model, name: ir.OperatorIdentifier) -> list[ir.OperatorIdentifier]:
    found = (n.op_identifier() for n in model.functions[name].all_nodes())
    return [c for c in dict.fromkeys(found) if c in model.functions]
