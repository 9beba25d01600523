"""Write a dataset of others as our own store, or any dataset as one file for LeWorldModel.

The source is only read. A shard is written beside its name and renamed when whole, so an
interrupted conversion continues where it stopped; a file for LeWorldModel is whole or not there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import jepa_world
from jepa_world.config import require_at_least, to_dict
from jepa_world.data.layouts import Table
from jepa_world.data.trajectories import (
    Columns,
    Episode,
    Trajectories,
    find_columns,
    is_complete,
    open_tables,
    write_shard,
    write_store,
)
from jepa_world.processes import ProcessDied, map_in_processes
from jepa_world.registry import UserError

_NOT_SETTINGS = ("data", "to", "workers", "columns")


@dataclass(frozen=True)
class Convert:
    """Write a dataset in any layout that is read here anew, as a folder of shards or one file."""

    data: Path
    """Dataset, in one of the layouts of docs/datasets.md; nothing in it is changed."""
    to: Path | None = None
    """A new folder of shards; or a new .h5 file, in the layout of LeWorldModel and
    stable-worldmodel. Default: data/<name of the source>."""
    columns: Columns = Columns()
    """Which of its columns are the pictures and the actions."""
    keep: tuple[str, ...] | None = None
    """Further columns to keep; by default all columns of numbers."""
    image_size: int | None = None
    """Scale the middle square of the frames to this height and width; default: as they are."""
    jpeg: bool = False
    """Store frames as JPEG: 4 to 6 times smaller, slower to read."""
    shard_episodes: int = 100
    """Episodes of a shard."""
    workers: int = 0
    """Processes; 0 is one for every core."""


def run(config: Convert) -> None:
    """Convert what is not converted yet, and say where it is."""
    require_at_least(config, shard_episodes=1, workers=0)
    if config.image_size is not None:
        require_at_least(config, image_size=1)
    target = config.to or Path("data") / config.data.stem
    _check_places(config, target)
    data = _open(config)
    try:
        if target.suffix in (".h5", ".hdf5"):
            _write_file(config, data, target)
        else:
            _write_folder(config, data, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    except ProcessDied as error:
        numbers = ", ".join(map(str, error.items))
        raise UserError(
            f"a process died at one of the episodes {numbers} (out of memory?); run again to "
            f"continue in {target}, perhaps with --workers 1"
        ) from error
    finally:
        _open.cache_clear()
    made = Trajectories(target)
    size = "x".join(map(str, made.frame_shape))
    print(data.origin)
    print(f"{made.num_episodes} episodes, {made.lengths.sum()} frames of {size}: {target}")


def _check_places(config: Convert, target: Path) -> None:
    inside, outside = target.resolve(), config.data.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise UserError(f"{target} and {config.data} lie in each other: name another --to")
    if target.is_file():
        raise UserError(f"{target} is there already: nothing is overwritten, name another --to")
    if config.jpeg and target.suffix:
        raise UserError("LeWorldModel reads no JPEG: leave out --jpeg, or give a folder as --to")


def _write_file(config: Convert, data: Trajectories, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    episodes = _episodes(config, list(range(data.num_episodes)))
    with tqdm(episodes, "converting", data.num_episodes, unit="episode") as progress:
        write_shard(target, progress)


def _write_folder(config: Convert, data: Trajectories, target: Path) -> None:
    settings = {key: value for key, value in to_dict(config).items() if key not in _NOT_SETTINGS}
    settings |= {
        "source": str(config.data),
        "layout": data.layout,
        "columns": data.names,
        "episodes": data.num_episodes,
        "env": data.env,
    }
    versions = {"jepa_world": jepa_world.__version__}
    if is_complete(target, settings, versions):
        return
    description = {"settings": settings, "versions": versions}
    write_store(
        *(target, description, partial(_episodes, config), data.num_episodes),
        shard_episodes=config.shard_episodes,
        jpeg=config.jpeg,
        doing="converting",
    )


def _episodes(config: Convert, indices: list[int]) -> Iterator[Episode]:
    """Read episodes in order, in this process or in spawned ones."""
    one = config.data.suffix == ".npz"  # where each process would unpack all frames
    workers = 1 if one else config.workers
    yield from map_in_processes(partial(_episode, config), indices, workers=workers)


def _episode(config: Convert, index: int) -> dict[str, Any]:
    """Return one row of every column for every frame of an episode, by names that HDF5 can have."""
    data = _open(config)
    first = np.array([data.lengths[:index].sum()])
    batch = data.read(first, int(data.lengths[index]))
    episode = {name.replace("/", "."): rows[0] for name, rows in batch.items()}
    if config.image_size is not None:
        from jepa_world.data.clips import square  # imports torch, which takes processes seconds

        episode["pixels"] = square(episode["pixels"], config.image_size)
    return episode


@lru_cache(maxsize=1)  # one for each process
def _open(config: Convert) -> Trajectories:
    """Open the source with the columns that are to be kept, frames in their files."""
    (table, *_) = open_tables(config.data)[1]
    found = find_columns(table, None, config.columns)
    others = _others(table, found) if config.keep is None else config.keep
    return Trajectories(
        config.data,
        columns=[*found, *(name for name in others if name not in found)],
        pixels=config.columns.pixels,
        action=config.columns.action,
        cache_bytes=0,
        bad_share=0,  # what is converted is whole
    )


def _others(table: Table, found: dict[str, str]) -> list[str]:
    """Return the further columns of numbers, without texts and names that are taken."""
    free = [name for name in table.numbers if name not in (*found, *found.values())]
    kinds = {name: table.numbers[name]().dtype for name in free}
    return [name for name in free if kinds[name].kind in "biuf"]
