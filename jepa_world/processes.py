"""Work spread over processes: spawned here, or those that a launcher started side by side."""

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from jepa_world.registry import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

NUMBER = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
COUNT = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def launched() -> tuple[int, int]:
    """Return this process's number and how many torchrun, accelerate launch or MPI started.

    Raises:
        UserError: accelerate launch was to start several and started this one alone.
    """
    number, count = (
        next((int(os.environ[name]) for name in names if name in os.environ), default)
        for names, default in ((NUMBER, 0), (COUNT, 1))
    )
    counted = any(name in os.environ for name in COUNT)
    if not counted and {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys():
        raise UserError(
            "accelerate launch was asked for several processes on a CPU and started one, as it "
            "does without MPI: use --config_file configs/accelerate/cpu_2.yaml"
        )
    return number, count


def own_share(items: Sequence[Item], what: str) -> Sequence[Item]:
    """Return every n-th item, from this process's number on, where n were launched.

    Raises:
        UserError: fewer items than processes; `what` names the items.
    """
    number, count = launched()
    if len(items) < count:
        raise UserError(f"{count} processes for {len(items)} {what}: start fewer")
    return items[number::count]


def gather(own: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """Return the results of all processes that were launched, in the order of their items.

    Args:
        own: By name, what this process made of its `own_share` of some items.
    """
    _, count = launched()
    if count == 1:
        return {name: list(results) for name, results in own.items()}
    import torch.distributed as dist
    import torch.distributed.nn  # noqa: F401  # imported later, it would keep the group alive
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    longest = timedelta(days=7)  # the slowest may take long
    store, number, count = next(rendezvous("env://", timeout=longest))
    store.set_timeout(longest)
    fresh = PrefixStore(f"gather {next(_GATHERED)}", store)  # without a former group's ports
    dist.init_process_group("gloo", timeout=longest, store=fresh, rank=number, world_size=count)
    shares: list[Any] = [None] * count
    dist.all_gather_object(shares, dict(own))
    dist.destroy_process_group()
    return {name: _dealt_back([share[name] for share in shares]) for name in own}


_GATHERED = itertools.count()


def _dealt_back(shares: list[list[Result]]) -> list[Result]:
    results: list[Any] = [None] * sum(map(len, shares))
    for number, share in enumerate(shares):
        results[number :: len(shares)] = share
    return results


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
