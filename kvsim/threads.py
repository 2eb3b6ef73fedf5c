"""Lanes (or lines of a trace) over the cores of this process: compiled loops that each do some and hold no lock.

They share nothing, so how many threads there are changes no number.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from queue import SimpleQueue
from threading import Thread
from typing import Any

THREADED = 1 << 17  # slots of all lanes from which handing some of them to another core pays
_PARTS = 2  # per core: who is done first takes what is left, so that a core in other use holds up nobody


def each(loop: Callable[..., None], lanes: int, slots: int, *arguments: Any, together: int = 1) -> None:
    """`loop(begin, end, *arguments)` over all lanes, on every core where they have enough slots; as many neighbours as
    `together` always in one part."""
    if cores() == 1 or lanes * slots < THREADED:
        loop(0, lanes, *arguments)
        return
    groups = -(-lanes // together)
    parts = min(groups, _PARTS * cores())
    ends = [min(lanes, groups * i // parts * together) for i in range(parts + 1)]
    ranges = iter(list(pairwise(ends)))
    done: SimpleQueue[BaseException | None] = SimpleQueue()

    def work() -> None:
        for begin, end in ranges:
            try:
                loop(begin, end, *arguments)
                done.put(None)
            except BaseException as error:
                done.put(error)

    jobs = _jobs(os.getpid(), cores() - 1)
    for _ in range(cores() - 1):
        jobs.put(work)
    work()
    errors = [done.get() for _ in range(parts)]
    if error := next(filter(None, errors), None):
        raise error


@cache
def cores() -> int:
    """Cores that this process may use; one where it is a worker of another, which has more of them."""
    if multiprocessing.parent_process() is not None:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _jobs(process: int, others: int) -> SimpleQueue[Callable[[], None]]:
    """What the `others` of this process's threads take their work from; a fork has none of its parent's."""
    jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
    for _ in range(others):
        Thread(target=_serve, args=(jobs,), name="kvsim-lanes", daemon=True).start()
    return jobs


def _serve(jobs: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()
