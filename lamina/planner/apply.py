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
    # trap: dropping a sum that is an interface output hands its name to the one before it
    outputs = [site_outputs(move, rewriter) for move in moves]
    for move, replaced in zip(moves, outputs, strict=True):
        transform = get_transform(move.site.transform)
        emit_move(transform, move, rewriter, replaced)
        finish = getattr(transform, "finish", None)
        if finish is not None:
            finishers.append(partial(finish, move.site, rewriter))
    for finisher in finishers:
        finisher()
    return clone


def emit_move(
    transform: Transform, move: Move, rewriter: Rewriter, outputs: Sequence[ir.Value] | None = None
) -> None:
    """Emit one option in place and let every reader use it; the old nodes stay, unread.

    Args:
        transform: Who offered the move.
        move: What to emit.
        rewriter: Of the program.
        outputs: What :func:`site_outputs` found before other moves of the same plan changed names.
    """
    nodes = _site_nodes(move, rewriter)
    replaced = site_outputs(move, rewriter) if outputs is None else outputs
    rewriter.at(nodes[move.site.nodes[-1]])
    emitted = transform.emit(move.site, move.option, rewriter, nodes)
    rewriter.at(None)
    for old, new in zip(replaced, emitted, strict=True):
        rewriter.replace_uses(old, new)
    rewriter.record(move.site.transform, move.site.name, move.option.name)


def site_outputs(move: Move, rewriter: Rewriter) -> list[ir.Value]:
    """The values that the move's site gives to the rest of the program, as its outputs are named now.

    Raises:
        PassError: The program lacks a node or an output of the site.
    """
    nodes = _site_nodes(move, rewriter)
    return [_output(nodes, name) for name in move.site.outputs]


def _site_nodes(move: Move, rewriter: Rewriter) -> dict[str, ir.Node]:
    nodes: dict[str, ir.Node] = {}
    for name in move.site.nodes:
        if not rewriter.has_node(name):
            raise PassError(
                f"site '{move.site.name}' needs node '{name}', which is not in the program",
                where=f"{move.site.transform} {move.option.name}",
                advice="the plan was made for another model or another version of lamina",
            )
        nodes[name] = rewriter.node(name)
    return nodes


def _output(nodes: dict[str, ir.Node], name: str) -> ir.Value:
    for node in nodes.values():
        for value in node.outputs:
            if value.name == name:
                return value
    raise PassError(f"no node of the site produces '{name}'", advice="the plan was made for another model")
