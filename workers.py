"""Threads and processes that share work out.

Calling scripts need no `if __name__ == "__main__":`, since processes do not run them again.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

PART = 64  # items that a thread takes at a time: each call that waits takes a kilobyte, and time
PARENT_SECONDS = 1  # between looks at whether the parent is alive


def usable_cores() -> int:
    """Return the number of cores this process may use, fewer on a cluster than the machine has.

    At most 8, since each process takes time to start.
    """
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(len(own), 8)


def map_threads(function: Callable[[S], T], items: Sequence[S], threads: int) -> list[T]:
    """Return what a function returns for each item, computed by so many threads."""
    size = max(1, min(PART, len(items) // (4 * threads)))
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(threads) as pool:
        return [value for part in pool.map(lambda part: [function(item) for item in part], parts) for value in part]


def as_computed(executor: Executor, function: Callable[[S], T], items: Iterable[S], most: int) -> Iterator[T]:
    """Yield what a function returns for each item, in the order in which an executor computes it.

    At most so many calls wait, run, or have results that nobody took yet: those of all items could fill the memory. An
    exception of a call is raised after the results of those that ended with it.
    """
    left = iter(items)
    under_way: list[Future[T]] = []
    try:
        while under_way := [
            *under_way,
            *(executor.submit(function, item) for item in islice(left, most - len(under_way))),
        ]:
            ended, _ = wait(under_way, return_when=FIRST_COMPLETED)
            results = [call for call in under_way if call in ended]
            under_way = [call for call in under_way if call not in ended]
            for call in sorted(results, key=lambda call: call.exception() is not None):
                yield call.result()
    finally:
        for call in under_way:  # so that Ctrl-C does not wait for the rest
            call.cancel()


@contextmanager
def process_pool(processes: int) -> Iterator[Executor]:
    """Yield an executor of so many processes, which end with the block, at once if it is left by an exception."""
    from loky import ProcessPoolExecutor  # here, because most commands start no processes

    pool = ProcessPoolExecutor(processes, initializer=begin, env={"OMP_NUM_THREADS": "1"})
    try:
        yield pool
    finally:
        pool.shutdown(kill_workers=True)


def begin() -> None:
    """Prepare a process of a pool to end with its parent, and leave Ctrl-C, which a terminal sends to all, to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    """Wait until a parent has ended, killed perhaps, and end the process."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)
