"""Apply moves to a program: the one place where options become nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import onnx_ir as ir

from lamina.errors import LaminaError, PassError
from lamina.ir.opset import raise_opset
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.ir.verify import verify_all, verify_structure
from lamina.passes import get_transform
from lamina.passes.fold import cleanup
from lamina.passes.pass_ import Transform
from lamina.planner.plan import Move
from lamina.planner.thorough import verify_thoroughly

# Value.meta of what a move put in the place of a value: that value's name.
STANDS_FOR = "lamina.stands_for"


def required_opset(moves: Iterable[Move]) -> int:
    """The lowest default opset the moves' options can be written in."""
    return max((int(m.option.parameters.get("opset", 13)) for m in moves), default=13)


def removes(move: Move) -> bool:
    """Whether a move takes its site's nodes out: it comes before those that change what stays."""
    return get_transform(move.site.transform).removes_site


def apply_moves(program: Program, moves: Sequence[Move]) -> Program:
    """Apply moves to a clone: drops first, then the other transforms, then exact clean-up.

    Raises:
        PassError: A move names a node the program does not have.
    """
    dropped = apply_drops(program, moves)
    return apply_rest(dropped, moves)


def apply_drops(program: Program, moves: Sequence[Move]) -> Program:
    """Only the moves that remove their site, on a clone, cleaned up.

    Raises:
        PassError: A move cannot be applied; names it.
        VerificationError: What it leaves is not whole.
    """
    return _applied(program, [m for m in moves if removes(m)])


def apply_rest(program: Program, moves: Sequence[Move]) -> Program:
    """The moves that rewrite their site, on a clone, cleaned up.

    Raises:
        PassError: A move cannot be applied; names it.
        VerificationError: What it leaves is not whole.
    """
    return _applied(program, [m for m in moves if not removes(m)])


def _applied(program: Program, moves: Sequence[Move]) -> Program:
    if not moves:
        return program.clone()
    emitted = _emit_all(program, moves)
    verify_structure(emitted, ", ".join(sorted({m.site.transform for m in moves})))
    return cleanup(emitted)


def _emit_all(program: Program, moves: Sequence[Move]) -> Program:
    clone = program.clone()
    version = required_opset(moves)
    if clone.opset < version:
        raise_opset(clone.model, version)
    rewriter = Rewriter(clone.model)
    finishers: list[tuple[Move, Callable[[], None]]] = []
    thorough = verify_all()
    # trap: dropping a sum that is an interface output hands its name to the one before it
    outputs = [site_outputs(move, rewriter) for move in moves]
    for move, replaced in zip(moves, outputs, strict=True):
        transform = get_transform(move.site.transform)
        with _naming(move):
            emit_move(transform, move, rewriter, replaced)
        if thorough:
            verify_thoroughly(clone, _name(move))
        finish = getattr(transform, "finish", None)
        if finish is not None:
            finishers.append((move, partial(finish, move.site, rewriter)))
    for move, finisher in finishers:
        with _naming(move):
            finisher()
    return clone


@contextmanager
def _naming(move: Move) -> Iterator[None]:
    """Whatever goes wrong inside names the move."""
    try:
        yield
    except LaminaError:
        raise
    except Exception as error:  # a bug in a transform, perhaps a third party's: the planner leaves it out
        transform = move.site.transform
        raise PassError(
            f"{_name(move)} failed: {type(error).__name__}: {error}",
            advice=f"this is a bug in {transform}: report it, and leave it out with transforms=[...]",
        ) from error


def _name(move: Move) -> str:
    return f"{move.site.transform} {move.option.name} at '{move.site.name}'"


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
        if not transform.removes_site:
            new.meta[STANDS_FOR] = old.name
        rewriter.replace_uses(old, new)
    rewriter.record(move.site.transform, move.site.name, move.option.name)


def site_outputs(move: Move, rewriter: Rewriter) -> list[ir.Value]:
    """The values that the move's site gives to the rest of the program, as its outputs are named now.

    Raises:
        PassError: The program lacks a node or an output of the site.
    """
    nodes = _site_nodes(move, rewriter)
    made = {v.name: v for n in nodes.values() for v in n.outputs}
    if len(move.site.outputs) == 1 and move.site.outputs[0] not in made:
        # trap: a drop before may have handed the name of an interface output to this site's value
        return [nodes[move.site.nodes[-1]].outputs[0]]
    missing = next((name for name in move.site.outputs if name not in made), None)
    if missing is not None:
        raise PassError(
            f"no node of the site produces '{missing}'", advice="the plan was made for another model"
        )
    return [made[name] for name in move.site.outputs]


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
