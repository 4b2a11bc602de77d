"""One pool of memory for the activations of many sessions that run one after another."""

from __future__ import annotations

from functools import cache
from typing import Any


def share_arena(options: Any) -> None:
    """Let a session take its activations from the pool that all such sessions of the process share.

    A session by itself keeps what its largest run needed for as long as it lives, so the sessions of L
    changed programs hold L batches of activations; of sessions that share a pool and take turns, the pool
    holds one. Its pages stay with the process, and the next sessions find them there: that also saves asking
    the system for them again, which takes as long as a third of a run of a small decoder.

    Args:
        options: The session options to change.
    """
    _register()
    options.add_session_config_entry("session.use_env_allocators", "1")
    # weights belong to one session alone, and go with it
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    # trap: planned patterns take one block a shape beside the pieces of the first run: twice the memory
    options.enable_mem_pattern = False


@cache
def _register() -> None:
    import onnxruntime as ort

    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    try:
        ort.create_and_register_allocator(place, None)
    except Exception as error:
        # somebody else in this process has registered one: that serves as well
        if "already" not in str(error):
            raise
