"""The collector rests meanwhile and finds all garbage afterwards."""

from __future__ import annotations

import gc
import weakref

from lamina.ir.collector import _MANY, collector_paused


class _Knot:
    def __init__(self) -> None:
        self.me = self


def test_garbage_made_meanwhile_is_found_later() -> None:
    with collector_paused():
        assert not gc.isenabled()
        seen = weakref.ref(_Knot())
        assert seen() is not None
    assert gc.isenabled()
    gc.collect()
    assert seen() is None


def test_what_is_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with collector_paused():
            made = [_Knot() for _ in range(_MANY + 1)]
        assert gc.get_freeze_count() == count
        assert made[0].me is made[0]
    finally:
        gc.unfreeze()


def test_garbage_among_many_young_objects_is_found_later() -> None:
    with collector_paused():
        made = [_Knot() for _ in range(_MANY + 1)]
        seen = weakref.ref(made[-1])
        del made
    assert gc.isenabled()
    gc.collect()
    assert seen() is None


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
