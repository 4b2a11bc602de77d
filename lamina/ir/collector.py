"""Python's garbage collector, kept from walking over graphs of 100,000 nodes again and again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

# Young objects that take a collection tens of milliseconds.
_MANY = 100_000


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Look for no garbage meanwhile: half the time of reading a deep model went there.

    What was made meanwhile joins the oldest objects unseen: looking at it all when collecting goes on would
    take half a second for a deep model. Any full collection still finds what is garbage in it.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            # What somebody froze stays frozen; asking walks over all of it, which few objects are not worth.
            if gc.get_count()[0] > _MANY and not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()
