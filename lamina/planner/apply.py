"""Apply moves to a program: the one place where options become nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.opset import raise_opset
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes import get_transform
from lamina.passes.fold import cleanup
from lamina.passes.pass_ import Transform
from lamina.planner.plan import Move


def required_opset(moves: Iterable[Move]) -> int:
    """The lowest default opset the moves' options can be written in."""
    return max((int(m.option.parameters.get("opset", 13)) for m in moves), default=13)


def apply_moves(program: Program, moves: Sequence[Move]) -> Program:
    """Apply moves to a clone: drops first, then the other transforms, then exact clean-up.

    Raises:
        PassError: A move names a node the program does not have.
    """
    dropped = apply_drops(program, moves)
    return apply_rest(dropped, moves)


def apply_drops(program: Program, moves: Sequence[Move]) -> Program:
    """Only the moves that remove their site, on a clone, cleaned up."""
    chosen = [m for m in moves if m.option.name == "drop"]
    return cleanup(_emit_all(program, chosen)) if chosen else program.clone()


def apply_rest(program: Program, moves: Sequence[Move]) -> Program:
    """The moves that rewrite their site, on a clone, cleaned up."""
    chosen = [m for m in moves if m.option.name != "drop"]
    return cleanup(_emit_all(program, chosen)) if chosen else program.clone()


def _emit_all(program: Program, moves: Sequence[Move]) -> Program:
    clone = program.clone()
    version = required_opset(moves)
    if clone.opset < version:
        raise_opset(clone.model, version)
    rewriter = Rewriter(clone.model)
    finishers: list[Callable[[], None]] = []
    for move in moves:
        transform = get_transform(move.site.transform)
        emit_move(transform, move, rewriter)
        finish = getattr(transform, "finish", None)
        if finish is not None:
            finishers.append(partial(finish, move.site, rewriter))
    for finisher in finishers:
        finisher()
    return clone


def emit_move(transform: Transform, move: Move, rewriter: Rewriter) -> None:
    """Emit one option in place and let every reader use it; the old nodes stay, unread."""
    nodes: dict[str, ir.Node] = {}
    for name in move.site.nodes:
        if not rewriter.has_node(name):
            raise PassError(
                f"site '{move.site.name}' needs node '{name}', which is not in the program",
                where=f"{move.site.transform} {move.option.name}",
                advice="the plan was made for another model or another version of lamina",
            )
        nodes[name] = rewriter.node(name)
    outputs = [_output(nodes, name) for name in move.site.outputs]
    rewriter.at(nodes[move.site.nodes[-1]])
    emitted = transform.emit(move.site, move.option, rewriter, nodes)
    rewriter.at(None)
    for old, new in zip(outputs, emitted, strict=True):
        rewriter.replace_uses(old, new)
    rewriter.record(move.site.transform, move.site.name, move.option.name)


def _output(nodes: dict[str, ir.Node], name: str) -> ir.Value:
    for node in nodes.values():
        for value in node.outputs:
            if value.name == name:
                return value
    raise PassError(f"no node of the site produces '{name}'", advice="the plan was made for another model")
