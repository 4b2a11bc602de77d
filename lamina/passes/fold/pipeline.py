"""Running folds: to a fixed point, guarded, and so that the names of what ran reproduce the result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from lamina.errors import LaminaError
from lamina.ir.collector import collector_paused
from lamina.ir.opset import raise_opset
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewrite, Rewriter
from lamina.ir.verify import verify_all, verify_structure
from lamina.passes.fold.catalog import (
    CLEANUP,
    FOLDS,
    FORMS,
    FOUNDATIONS,
    LAST,
    ON_REQUEST,
    TIDY,
    UNAFFECTED,
    canonical,
    load,
)
from lamina.passes.fold.graph import LocalFold, Operators, every_node
from lamina.passes.fold.interface import Original, keep_interface
from lamina.passes.fold.library import LibraryFold
from lamina.passes.fold.thorough import verify_outputs
from lamina.passes.pass_ import Fold

_ROUNDS = 5
Fingerprint = list[tuple[object, ...]]


def form_names() -> tuple[str, ...]:
    """The names of the equivalent forms that :func:`fold` takes, in the order it applies them."""
    return FORMS


def fold(
    program: Program,
    *,
    forms: Sequence[str] = (),
    only: Sequence[str] | None = None,
    without: Collection[str] = (),
    again: Callable[[], Program] | None = None,
) -> tuple[Program, tuple[str, ...], list[Rewrite]]:
    """Fold a clone of ``program`` to a fixed point, then write the named forms.

    Args:
        program: What to fold; it is not changed.
        forms: Names out of :func:`form_names`, applied in that function's order, or of
            :data:`lamina.passes.fold.catalog.ON_REQUEST`, applied after them; those that one builds on
            (:data:`lamina.passes.fold.catalog.FOUNDATIONS`) are applied too.
        only: Apply these of the always-applied folds instead of all.
        without: Leave these out, wherever they would run.
        again: Gives ``program`` once more. Where it is given, ``program`` itself is folded and no clone.

    Returns:
        The folded program, the names of the passes that changed something in the order they ran (what
        :func:`apply_named` takes), and every change. A pass that had to be undone is among the changes too.

    Raises:
        PassError: A name is unknown.
    """
    always = FOLDS if only is None else tuple(canonical(n) for n in only)
    chosen = {canonical(n) for n in forms}
    chosen.update(below for name in tuple(chosen) for below in FOUNDATIONS.get(name, ()))
    order = dict.fromkeys((*FORMS, *ON_REQUEST, *sorted(chosen)))
    ordered = [name for name in order if name in chosen]
    banned = {canonical(n) for n in without}
    with collector_paused():
        run = _folded(program, always, ordered, banned, again)
    return program.with_model(run.model), tuple(run.applied), run.records


def _folded(
    program: Program,
    always: Sequence[str],
    forms: Sequence[str],
    banned: set[str],
    again: Callable[[], Program] | None,
) -> _Run:
    """Fold, verify at the end; where that fails, fold again and verify after every pass, to know which."""
    first: Exception | None = None
    if not verify_all():
        run = _Run(program, set(banned), careful=False, used_up=again is not None)
        try:
            run.to_fixed_point(always, forms)
            verify_structure(run.model)
        except Exception as error:  # a library's bug must not stop the user: the second run goes without it
            first = error
        else:
            return run
        program = program if again is None else again()
    run = _Run(program, set(banned))
    run.to_fixed_point(always, forms)
    if (
        first is not None and run.banned == banned
    ):  # what failed did not fail again: it is on record all the same
        run.records.append(Rewrite("fold", "model", f"undone: {_reason(first)}, at the first attempt only"))
    return run


def apply_named(program: Program, names: Sequence[str]) -> Program:
    """Apply folds to a clone of ``program``, each once, in the order given: what a plan replays.

    Raises:
        PassError: A name is unknown.
        VerificationError: A pass broke an invariant or the interface; names the pass.
    """
    return replay(program, names)[0]


def replay(program: Program, names: Sequence[str]) -> tuple[Program, list[Rewrite]]:
    """Do what :func:`apply_named` does, and return the changes as well."""
    model, records = program.clone().model, list[Rewrite]()
    original = Original(program)
    with collector_paused():
        now = fingerprint(model, list(every_node(model.graph)))
        for name in names:
            model, now, _ = _guarded(canonical(name), model, now, original, records)
    return program.with_model(model), records


def cleanup(program: Program) -> Program:
    """Remove what lossy moves leave behind, from a clone: equal conversions, idle Relus, dead weights."""
    run = _Run(program)
    for name in CLEANUP:
        run.step(name)
    return program.with_model(run.model)


@dataclass
class _Run:
    """One fold in progress: the model, what was applied, and what is banned because it failed.

    A careful one verifies after every pass, and undoes and bans the pass that fails; another leaves both to
    its caller, and may use ``program`` up.
    """

    program: Program
    banned: set[str] = field(default_factory=set)
    model: ir.Model = field(init=False)
    applied: list[str] = field(default_factory=list)
    records: list[Rewrite] = field(default_factory=list)
    careful: bool = True
    used_up: bool = False
    _original: Original = field(init=False)
    _now: Fingerprint = field(init=False)
    _settled: dict[str, int] = field(default_factory=dict)
    _nodes: list[ir.Node] | None = None  # None: not looked at since the last change
    _operators: Operators | None = None  # likewise

    def __post_init__(self) -> None:
        self._original = Original(self.program)
        self.model = self.program.model if self.used_up else self.program.clone().model
        self._nodes = list(every_node(self.model.graph))
        self._now = fingerprint(self.model, self._nodes)

    def to_fixed_point(self, always: Sequence[str], forms: Sequence[str]) -> None:
        """Run passes until none changes anything, then the forms and what tidies up after them."""
        for _ in range(_ROUNDS):
            if not [name for name in always if name not in LAST and self.step(name)]:
                break
        else:
            self.records.append(Rewrite("fold", "model", f"stopped after {_ROUNDS} rounds of changes"))
        for names in (forms, [name for name in LAST if name in always]):
            if [name for name in names if self.step(name)]:
                for name in TIDY:
                    self.step(name)

    def step(self, name: str) -> bool:
        """Run one pass; whether it changed anything."""
        if name in self.banned or self._is_settled(name):
            return False
        records: list[Rewrite] = []
        try:
            now, nodes = (self._now, self._nodes) if self._is_idle(name) else self._guarded(name, records)
        except Exception as error:  # a library's bug must not stop the user; it is on record
            if not self.careful:
                raise
            self._undo(name, error)
            return False
        if now == self._now:
            self._settled[name] = len(self.applied)
            return False
        self._now, self._nodes, self._operators = now, nodes, None
        self.applied.append(name)
        self.records.extend(records)
        if name in UNAFFECTED:
            self._settled[name] = len(self.applied)
        return True

    def _is_idle(self, name: str) -> bool:
        """Whether what a pass wants is not there; passes share one view of the graph to look for it."""
        found = load(name)
        if self._operators is None:
            self._operators = Operators(self.model.graph, self._nodes)
        if found.wants and not any(op in self._operators for op in found.wants):
            return True
        return isinstance(found, LocalFold) and found.idle(self.model, self._operators)

    def _guarded(self, name: str, records: list[Rewrite]) -> tuple[Fingerprint, list[ir.Node] | None]:
        self.model, now, nodes = _guarded(
            name, self.model, self._now, self._original, records, verify=self.careful, nodes=self._nodes
        )
        return now, nodes

    def _is_settled(self, name: str) -> bool:
        """Whether nothing that concerns the pass changed since it found nothing more to do."""
        since = self._settled.get(name)
        return since is not None and set(self.applied[since:]) <= set(UNAFFECTED.get(name, ()))

    def _undo(self, name: str, error: Exception) -> None:
        # Replaying costs time only when a pass fails; a copy before every pass would cost it always.
        self.banned.add(name)
        self.records.append(Rewrite(load(name).name, "model", f"undone: {_reason(error)}"))
        self.model = apply_named(self.program, self.applied).model
        self._nodes, self._operators = list(every_node(self.model.graph)), None
        self._now = fingerprint(self.model, self._nodes)


def _reason(error: Exception) -> str:
    said = error.what if isinstance(error, LaminaError) else f"{type(error).__name__}: {error}"
    return said.splitlines()[0][:200]


def _guarded(
    name: str,
    model: ir.Model,
    before: Fingerprint,
    original: Original,
    records: list[Rewrite],
    verify: bool = True,
    nodes: list[ir.Node] | None = None,
) -> tuple[ir.Model, Fingerprint, list[ir.Node] | None]:
    """Run one pass on ``model`` in place, and check interface and structure if it changed something.

    Args:
        name: Of the pass.
        model: What to change.
        before: Its fingerprint.
        original: What was folded.
        records: Receives the changes.
        verify: Whether to check.
        nodes: All nodes of ``model``, where the caller has looked; then it has also looked whether a pass
            that works on one node at a time has something to do.

    Returns:
        The model, its fingerprint, and all of its nodes where they are known.
    """
    found = load(name)
    known = nodes is not None and isinstance(found, LocalFold)
    if not known and found.idle(model):
        return model, before, nodes
    model = _with_opset(found, model)
    rewriter = Rewriter(model, nodes=nodes if isinstance(found, LibraryFold) else None)
    if not isinstance(found, LocalFold) or found.minimum_opset <= model.opset_imports.get("", 1):
        found.apply(rewriter)
    records.extend(rewriter.records)
    keep_interface(found.name, model, original)
    now = list(every_node(model.graph)) if rewriter.nodes is None else rewriter.nodes
    after = fingerprint(model, now)
    if verify and after != before:
        verify_structure(model, found.name)
        if verify_all():
            verify_outputs(original.program, original.program.with_model(model), found.name)
    return model, after, now


def _with_opset(found: Fold, model: ir.Model) -> ir.Model:
    """Raise the opset where ``found``, which has something to do, needs it."""
    if isinstance(found, LocalFold) and model.opset_imports.get("", 1) < found.minimum_opset:
        raise_opset(model, found.minimum_opset)
    return model


def fingerprint(model: ir.Model, nodes: Sequence[ir.Node]) -> Fingerprint:
    """What differs when nodes, edges, names or types do; ``nodes`` are all nodes of ``model``."""
    parts: Fingerprint = [(dict(model.opset_imports), tuple(model.graph.initializers))]
    for node in nodes:
        parts.append((node, node.name, node.domain, node.op_type, len(node.attributes.data), node.inputs))
        for value in node.outputs:
            kind, shape = value.type, value.shape
            dims = None if shape is None else shape.dims
            parts.append((value.name, None if kind is None else kind.dtype, dims))
    parts.append(tuple([v.name for v in model.graph.outputs]))
    return parts
