"""Work spread over spawned processes."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], *, workers: int
) -> Iterator[Result]:
    """Yield the results in the order of the items, made in this process or in spawned ones.

    Args:
        work: A function of a module, or a partial of one; the processes import that module, and
            the caller's main module.
        items: What it is called with.
        workers: Number of processes; 0 is one for every core.

    Raises:
        ProcessDied: a process died; its `items` are those that were being worked on.
    """
    workers = min(workers or os.cpu_count() or 1, len(items))
    if workers <= 1:
        yield from map(work, items)
        return
    spawn = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as notes:
        pool = ProcessPoolExecutor(workers, spawn, initializer=_end_with_parent)
        try:
            yield from pool.map(partial(_noted, work, Path(notes)), enumerate(items))
        except BrokenProcessPool as error:
            numbers = sorted(int(note.name) for note in Path(notes).iterdir())
            raise ProcessDied([items[number] for number in numbers]) from error
        finally:
            pool.shutdown(cancel_futures=True)


class ProcessDied(BrokenProcessPool):
    """A process died while it worked on one of these items."""

    def __init__(self, items: Sequence[Any]) -> None:
        super().__init__(f"a process died while it worked on one of {len(items)}")
        self.items = items


def _noted(work: Callable[[Item], Result], notes: Path, numbered: tuple[int, Item]) -> Result:
    """Do the work, and leave a note of its number until it is done."""
    number, item = numbered
    note = notes / str(number)
    note.touch()
    try:
        return work(item)
    finally:
        note.unlink()


def _end_with_parent() -> None:
    """End this process when its parent is killed, which the pool does not see to."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
