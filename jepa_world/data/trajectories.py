"""Trajectories of an environment: frames, actions and states, episode after episode.

The store is a folder of HDF5 shards in the column layout that LeWorldModel and stable-worldmodel
users have, plus `dataset.yaml`. In every shard all episodes are concatenated along the first axis:

    pixels     (N, h, w, c) bytes, one frame a chunk; or N JPEG strings with the attribute `shape`
    action     (N, a)       action t leads from frame t to frame t + 1
    state ...  (N, ...)     further columns, one row for every frame
    ep_len     (episodes,)  frames of each episode
    ep_offset  (episodes,)  first row of each episode

An episode of T steps has T + 1 frames; the action at its last frame is zero. Datasets of others
read as well, in the layouts of `layouts` and `parquet`; NaN at a last frame is read as zero. Files
that cannot be opened, episodes with numbers that are not finite and windows whose frames cannot be
read are left out and named, until they are too many (`files.most_bad`).
"""

import copy
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image
from tqdm import tqdm

from jepa_world.config import read_yaml
from jepa_world.data.files import BAD_SHARE, Skipped, most_bad
from jepa_world.data.layouts import OPENERS, ReadFrames, Table, open_hdf5, reading
from jepa_world.data.parquet import open_lerobot, open_minari_arrow
from jepa_world.registry import UserError


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset are the pictures and the actions, by their names in it."""

    pixels: str | None = None
    """Column of pictures; default: `pixels`, or the first there is."""
    action: str | None = None
    """Column of actions; default: `action` or `actions`."""


class Trajectories:
    """Read windows of consecutive frames from a store; safe to use after a fork or a pickle.

    A set whose frames fit in `cache_bytes` is decoded into memory at the first read; a larger one
    is read from its files. Datasets that are `also` read lie in front of it, and have its columns.
    `columns` names what a batch holds: by default pixels and action, and
    state and proprio where they are stored. `pixels` and `action` say which columns of a dataset of
    others these two are; `names` has what was found, `layout` what the dataset is, `skipped` the
    episodes that were left out. The place of a window whose frames cannot be read is taken by
    another, a function of the window alone.

    Raises:
        UserError: nothing there, a layout that is not known, a column that is missing, episodes and
            frames that disagree, an episode without frames, or more that is damaged or not finite
            than `bad_share` of the files or episodes (in small sets a tenth may be, and ten).

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> frames, actions = np.zeros((5, 8, 8, 3), np.uint8), np.zeros((5, 2), np.float32)
        >>> write_shard(folder / "shard-00000.h5", [{"pixels": frames, "action": actions}])
        >>> data = Trajectories(folder)
        >>> batch = data.read(data.windows(4), length=4)
        >>> batch["pixels"].shape, batch["action"].shape
        ((2, 4, 8, 8, 3), (2, 4, 2))
    """

    def __init__(
        self,
        path: str | Path,
        *,
        also: Sequence[str | Path] = (),
        columns: Sequence[str] | None = None,
        pixels: str | None = None,
        action: str | None = None,
        cache_bytes: int = 2 * 2**30,
        bad_share: float = BAD_SHARE,
    ):
        self.path = Path(path)
        self.also = [Path(other) for other in also]
        self.metadata, self.layout, tables, damaged = _open_whole(self.path, bad_share)
        self.names = find_columns(tables[0], columns, Columns(pixels, action))
        for other in self.also:
            metadata, _, others, more = _open_whole(other, bad_share)
            damaged |= {f"{other / name}": reason for name, reason in more.items()}
            if None not in (self.env, env := _env_of(metadata)) and env != self.env:
                raise UserError(f"{other} was collected in {env!r}, {path} in {self.env!r}")
            tables = [*others, *tables]
        self._lengths = np.concatenate([table.lengths for table in tables])
        self._offsets = np.cumsum(self._lengths) - self._lengths
        self._columns = {
            name: _concatenated([_read_numbers(table, name, source) for table in tables], tables)
            for name, source in self.names.items()
            if name != "pixels"
        }
        self.skipped = Skipped(len(self._lengths), f"episodes of {self.path}", bad_share)
        self.skipped.reasons |= damaged
        self._bad: set[int] = set()  # episodes, shared by all parts of the set
        self._leave_out_what_is_not_finite()
        source = self.names.get("pixels")
        self._frames = None if source is None else _Frames(tables, source, cache_bytes)
        self._latents: np.ndarray | None = None
        self._episodes = np.setdiff1d(np.arange(len(self._lengths)), list(self._bad))

    @property
    def env(self) -> str | None:
        """Return the Gymnasium id the dataset was collected in, where it says so."""
        return _env_of(self.metadata)

    @property
    def origin(self) -> str:
        """Say in a line what the dataset is and which of its columns are read."""
        read = ", ".join(
            name if name == source else f"{name} from {source}"
            for name, source in self.names.items()
        )
        also = "".join(f" and {other}" for other in self.also)
        return f"{self.path} ({self.layout}){also}: {read}"

    @property
    def num_episodes(self) -> int:
        """Count the episodes."""
        return len(self._episodes)

    @property
    def lengths(self) -> Int[np.ndarray, " e"]:
        """Return the frames of each episode (one more than its steps)."""
        return self._lengths[self._episodes]

    @property
    def num_frames(self) -> int:
        """Count the frames of the whole store, as windows number them."""
        return int(self._lengths.sum())

    @property
    def action_dim(self) -> int:
        """Return the width of an action."""
        return self._column("action").shape[1]

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Return (h, w, c) of a frame."""
        if self._frames is None:
            raise KeyError("'pixels' is not among the columns asked for")
        return self._frames.shape

    @cached_property
    def action_mean(self) -> Float[np.ndarray, " a"]:
        """Return the mean action over all steps of these episodes."""
        return self._steps("action").mean(0, dtype=np.float64).astype(np.float32)

    @cached_property
    def action_std(self) -> Float[np.ndarray, " a"]:
        """Return the standard deviation of the actions over all steps of these episodes."""
        return self._steps("action").std(0, dtype=np.float64).astype(np.float32)

    def windows(self, length: int, stride: int = 1) -> Int[np.ndarray, " w"]:
        """Return the first frame of every window of `length` frames, `stride` apart.

        No window crosses episodes. Frames are numbered over the whole store, in a split as well.
        """
        span = (length - 1) * stride + 1
        starts = [
            np.arange(offset, offset + frames - span + 1)
            for offset, frames in zip(self._offsets[self._episodes], self.lengths, strict=True)
        ]
        return np.concatenate(starts)

    def frames_after(self, rows: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """Count the frames of its episode that come after each frame."""
        episode = np.searchsorted(self._offsets, rows, side="right") - 1
        return self._offsets[episode] + self._lengths[episode] - 1 - rows

    def read(
        self, starts: Int[np.ndarray, " b"], length: int, stride: int = 1
    ) -> dict[str, np.ndarray]:
        """Read windows by their first frames: columns (b, t, ...), pixels bytes (b, t, h, w, c).

        With a stride above 1, a step's action is its `stride` actions side by side, (b, t,
        stride * a), zero beyond the end of the episode.
        """
        starts, pixels = self._readable(np.asarray(starts), length, stride)
        rows = starts[:, None] + stride * np.arange(length)
        batch = {name: column[rows] for name, column in self._columns.items() if name != "action"}
        if "action" in self._columns:
            batch["action"] = self._actions(rows, stride)
        if self._latents is not None:
            batch["latent"] = self._latents[rows].astype(np.float32)
        elif pixels is not None:
            batch["pixels"] = pixels
        return batch

    def with_latents(self, latents: Float[np.ndarray, "f n d"]) -> "Trajectories":
        """Return these episodes with a latent in place of the pixels of every frame of the store.

        Both share the files; a batch holds `latent` (b, t, n, d) in float32.
        """
        other = copy.copy(self)
        other._latents = latents
        return other

    def split(self, fraction: float) -> tuple["Trajectories", "Trajectories"]:
        """Return the first episodes and the last `fraction` of them, held out (at least one each).

        Both share the files and the cache.

        Raises:
            UserError: fewer than two episodes.
        """
        if self.num_episodes < 2:
            raise UserError(f"{self.path} has 1 episode: too few to hold one out")
        held_out = min(max(round(fraction * self.num_episodes), 1), self.num_episodes - 1)
        return self._subset(self._episodes[:-held_out]), self._subset(self._episodes[-held_out:])

    def _leave_out_what_is_not_finite(self) -> None:
        ends = np.cumsum(self._lengths)
        for name, column in self._columns.items():
            bad = ~np.isfinite(column.reshape(len(column), -1)).all(1)
            for row in np.flatnonzero(bad).tolist():
                episode = int(np.searchsorted(ends, row, side="right"))
                if episode not in self._bad:
                    step = row - int(self._offsets[episode])
                    self._leave_out(episode, f"{self.names[name]} is not finite in row {step}")

    def _leave_out(self, episode: int, reason: object) -> None:
        self._bad.add(episode)
        self.skipped.add(f"episode {episode}", reason)

    def _readable(
        self, starts: np.ndarray, length: int, stride: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return windows whose frames can be read, and the frames where they are asked for."""
        while True:
            starts = self._replaced(starts, length, stride)
            if self._frames is None or self._latents is not None:
                return starts, None
            try:
                return starts, self._frames.read(starts, length, stride)
            except UnreadableFrames as error:
                self._leave_out(self._episode_of(error.row), error)

    def _replaced(self, starts: np.ndarray, length: int, stride: int) -> np.ndarray:
        """Return windows, others in the place of those in episodes that cannot be read."""
        wrong = [i for i, start in enumerate(starts) if self._episode_of(int(start)) in self._bad]
        if not wrong:
            return starts
        if self._bad.issuperset(self._episodes.tolist()):
            raise UserError(f"{self.skipped.summary()}; that is all of one part")
        starts, windows = starts.copy(), self.windows(length, stride)
        for i in wrong:
            random = np.random.default_rng(int(starts[i]))
            while self._episode_of(int(starts[i])) in self._bad:
                starts[i] = windows[random.integers(len(windows))]
        return starts

    def _episode_of(self, row: int) -> int:
        return int(np.searchsorted(self._offsets, row, side="right")) - 1

    def _subset(self, episodes: np.ndarray) -> "Trajectories":
        part = copy.copy(self)
        part._episodes = episodes
        for name in ("action_mean", "action_std"):
            part.__dict__.pop(name, None)
        return part

    def _actions(self, rows: np.ndarray, stride: int) -> np.ndarray:
        column = self._columns["action"]
        if stride == 1:
            return column[rows]
        episode = np.searchsorted(self._offsets, rows[:, :1], side="right") - 1
        end = (self._offsets + self._lengths)[episode][..., None]
        block = rows[..., None] + np.arange(stride)  # b t stride
        actions = np.where((block < end)[..., None], column[np.minimum(block, end - 1)], 0)
        return rearrange(actions, "b t stride a -> b t (stride a)")

    def _steps(self, name: str) -> np.ndarray:
        first = zip(self._offsets[self._episodes], self.lengths, strict=True)
        rows = np.concatenate([np.arange(offset, offset + frames - 1) for offset, frames in first])
        return self._column(name)[rows]

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            raise KeyError(f"{name!r} is not among the columns asked for: {list(self._columns)}")
        return self._columns[name]


class UnreadableFrames(UserError):
    """Frames that cannot be read; `row` is the first of the window or the episode they are in."""

    def __init__(self, row: int, reason: UserError) -> None:
        super().__init__(str(reason))
        self.row = row


def open_tables(path: Path, skipped: Skipped | None = None) -> tuple[str, list[Table]]:
    """Return the name of the layout that lies at a path, and its tables in order.

    Args:
        path: File or folder.
        skipped: Takes up the files of a folder that cannot be opened; if not given, none may be.

    Raises:
        UserError: nothing there, a layout that is not known or lacks something, a damaged file.
    """
    if not path.exists():
        raise UserError(f"dataset {path} does not exist")
    if (path / "meta" / "info.json").is_file():
        return open_lerobot(path)
    for folder in (path, path / "data"):
        if (folder / "main_data.hdf5").is_file():
            return open_hdf5(folder / "main_data.hdf5")
        if (folder / "metadata.json").is_file():
            return open_minari_arrow(folder)
    files = _files(path)
    found = {file: opened for file in files if (opened := _opened(file, len(files), skipped))}
    layouts = {layout: file for file, (layout, _) in reversed(found.items())}
    if len(layouts) > 1:
        *_, other, one = layouts.items()
        raise UserError(f"{one[1]} is {one[0]}, {other[1].name} is {other[0]}: give one file")
    return next(iter(layouts)), [table for _, tables in found.values() for table in tables]


def _opened(file: Path, total: int, skipped: Skipped | None) -> tuple[str, list[Table]] | None:
    """Open a file; None for one that cannot be, where that is allowed."""
    try:
        return OPENERS[file.suffix](file)
    except UserError as error:
        if skipped is None or most_bad(total, skipped.share) == 0:
            raise
        skipped.total = total
        skipped.add(file.name, error)
        return None


def _files(path: Path) -> list[Path]:
    """Return the files of a folder that make its tables, all of one kind."""
    if path.is_file():
        if path.suffix in OPENERS:
            return [path]
        raise UserError(f"{path} is no dataset: expected {' '.join(OPENERS)}, or a folder of them")
    if (path / "ep_len.npz").is_file():
        raise UserError(
            f"{path} is stable-worldmodel's folder of pictures or videos, which is not read: "
            "`swm convert --dest-format hdf5` there makes a file that is"
        )
    for suffixes in ((".h5", ".hdf5"), (".mp4",), (".npz",)):
        files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
        if files:
            return files
    _check_complete(path, _read_metadata(path), 0)
    raise UserError(
        f"dataset {path} has no .h5 file, no .mp4 beside an .npz, no .npz, no main_data.hdf5 "
        "(Minari) and no meta/info.json (LeRobot)"
    )


def find_columns(table: Table, asked: Sequence[str] | None, named: Columns) -> dict[str, str]:
    """Return, for the columns of a batch, their names in a table.

    Args:
        table: The table.
        asked: Names of columns: `pixels`, `action`, `state`, `proprio`, or as in the table. By
            default the first two, and the others where they are.
        named: What the user says of the first two.

    Raises:
        UserError: one is not there.
    """
    asked = asked or (
        "pixels",
        "action",
        *(name for name in ("state", "proprio") if _find(table.numbers, name) is not None),
    )
    known = {name: _find(table.numbers, name) for name in asked if name != "pixels"}
    if "action" in known:
        known["action"] = named.action or known["action"]
    if "pixels" in asked:
        known["pixels"] = find_pixels(table, named.pixels)
    for name, source in known.items():
        there = table.pictures if name == "pixels" else table.numbers
        if source not in there:
            raise UserError(_lacks(table, name, source))
    return {name: str(known[name]) for name in asked}


def find_pixels(table: Table, named: str | None) -> str | None:
    """Return the column of pictures: the one named, `pixels`, or the first; None without any."""
    if named is not None or "pixels" in table.pictures:
        return named or "pixels"
    return next(iter(table.pictures), None)


_OTHER_NAMES = {"action": ("actions",), "state": ("states", "observation.state")}


def _find(columns: Mapping[str, object], name: str) -> str | None:
    candidates = (name, *_OTHER_NAMES.get(name, ()))
    return next((other for other in candidates if other in columns), None)


def _lacks(table: Table, name: str, source: str | None) -> str:
    """Say what a table has in place of a column."""
    there = f"columns there: {', '.join(sorted([*table.numbers, *table.pictures]))}"
    if name != "pixels":
        flag = "; --columns.action names another" if name == "action" else ""
        return f"{table.path} has no column {source or name!r}; {there}{flag}"
    kind = "of pictures, which are bytes (height, width, channels)"
    if source is None:
        return f"{table.path} has no column {kind}; {there}"
    also = ", ".join(table.pictures) or "none"
    return f"{table.path}: {source!r} is no column {kind}; those there: {also}"


class _Frames:
    """The frames of all tables: one array in memory when it fits in `cache_bytes`, else files."""

    def __init__(self, tables: list[Table], source: str, cache_bytes: int):
        for table in tables:
            if source not in table.pictures:
                raise UserError(_lacks(table, "pixels", source))
        self._pictures = [table.pictures[source] for table in tables]
        self._paths = [table.path for table in tables]
        self._lengths = [table.lengths for table in tables]
        self.shape = self._pictures[0].shape
        for path, lengths, pictures in zip(self._paths, self._lengths, self._pictures, strict=True):
            if pictures.shape != self.shape:
                raise UserError(f"{path} has frames {pictures.shape}, the others {self.shape}")
            _check_rows(path, source, pictures.rows, lengths)
        self._ends = np.cumsum([pictures.rows for pictures in self._pictures])
        self._fits = int(self._ends[-1]) * int(np.prod(self.shape)) <= cache_bytes
        self._cache: np.ndarray | None = None
        self._unreadable: dict[int, UserError] = {}  # by the first row of an episode, in the cache
        self._open: dict[int, ReadFrames] = {}
        self._process = os.getpid()

    def read(self, starts: np.ndarray, length: int, stride: int) -> np.ndarray:
        """Return (b, t, h, w, c) bytes.

        Raises:
            UnreadableFrames: some cannot be read.
        """
        if self._fits:
            whole = self._whole()
            for start in starts.tolist():
                if error := self._unreadable.get(self._first_of_episode(start)):
                    raise UnreadableFrames(start, error)
            return whole[starts[:, None] + stride * np.arange(length)]
        frames = np.empty((len(starts), length, *self.shape), np.uint8)
        tables = np.searchsorted(self._ends, starts, side="right")
        for row, (start, table) in enumerate(zip(starts, tables, strict=True)):
            first = int(start) - int(self._ends[table]) + self._pictures[table].rows
            last = first + (length - 1) * stride + 1
            try:
                frames[row] = self._read(int(table), first, last, stride)
            except UserError as error:
                raise UnreadableFrames(int(start), error) from error
        return frames

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_cache": None, "_unreadable": {}}

    def _first_of_episode(self, row: int) -> int:
        if not self._unreadable:
            return row
        firsts = np.cumsum(np.concatenate([[0], *self._lengths]))
        return int(firsts[np.searchsorted(firsts, row, side="right") - 1])

    def _whole(self) -> np.ndarray:
        """Return all frames; what takes longer than a few seconds shows its progress."""
        if self._cache is not None:
            return self._cache
        cache = np.empty((int(self._ends[-1]), *self.shape), np.uint8)
        row = 0
        with tqdm(desc="reading frames", total=len(cache), delay=3, leave=False) as progress:
            for table, lengths in enumerate(self._lengths):
                first = 0
                for length in lengths.tolist():
                    try:
                        cache[row : row + length] = self._read(table, first, first + length, 1)
                    except UserError as error:
                        self._unreadable[row] = error
                    first, row = first + length, row + length
                    progress.update(length)
                self._open.clear()
        self._cache = cache
        return cache

    def _read(self, table: int, first: int, last: int, step: int) -> np.ndarray:
        if self._process != os.getpid():  # an open HDF5 file does not survive a fork
            self._open, self._process = {}, os.getpid()
        path = self._paths[table]
        with reading(path):
            if table not in self._open:
                self._open[table] = self._pictures[table].open()
            frames = self._open[table](first, last, step)
        if frames.shape[1:] != self.shape:
            raise UserError(f"{path} has frames {frames.shape[1:]}, expected {self.shape}")
        return frames


def _read_metadata(path: Path) -> dict[str, Any]:
    """Return dataset.yaml of a folder, or nothing where there is none."""
    file = path / "dataset.yaml"
    metadata = read_yaml(file) if file.is_file() else {}
    settings = metadata.get("settings", {})
    if not isinstance(settings, dict):
        raise UserError(
            f"{str(file)!r} has the settings {settings!r:.80}: expected keys and values"
        )
    return metadata


def _open_whole(
    path: Path, bad_share: float
) -> tuple[dict[str, Any], str, list[Table], dict[str, str]]:
    """Return description, layout and tables of a dataset, and why files of it are left out.

    Raises:
        UserError: as `open_tables`, or episodes are missing.
    """
    metadata, damaged = _read_metadata(path), Skipped(0, "files", bad_share)
    layout, tables = open_tables(path, damaged)
    if not damaged:
        _check_complete(path, metadata, sum(len(table.lengths) for table in tables))
    return metadata, layout, tables, damaged.reasons


def _env_of(metadata: Mapping[str, Any]) -> str | None:
    return metadata.get("settings", {}).get("env")


def _concatenated(parts: list[np.ndarray], tables: list[Table]) -> np.ndarray:
    """Return the rows of all tables, which have to be equally wide."""
    for part, table in zip(parts, tables, strict=True):
        if part.shape[1:] != parts[-1].shape[1:]:
            raise UserError(
                f"{table.path} has rows of {part.shape[1:]} where {tables[-1].path} has "
                f"{parts[-1].shape[1:]}: give datasets of one kind"
            )
    return np.concatenate(parts)


def _check_complete(path: Path, metadata: Mapping[str, Any], found: int) -> None:
    expected = metadata.get("settings", {}).get("episodes", found)
    if found != expected:
        raise UserError(
            f"{path} holds {found} of {expected} episodes: an interrupted command, which "
            "finishes it when it runs again"
        )


def _check_rows(path: Path, name: str, count: int, lengths: np.ndarray) -> None:
    if count != lengths.sum():
        raise UserError(f"{path}: {name} has {count} rows, its episodes {lengths.sum()} frames")


def _read_numbers(table: Table, name: str, source: str) -> np.ndarray:
    """Return the rows of a column, NaN in the action at a last frame as zero."""
    if source not in table.numbers:
        raise UserError(_lacks(table, name, source))
    column, ends = table.numbers[source](), np.cumsum(table.lengths)
    if not np.issubdtype(column.dtype, np.number) and column.dtype != bool:
        raise UserError(f"{table.path}: column {source!r} is {column.dtype}, expected numbers")
    _check_rows(table.path, source, len(column), table.lengths)
    if name == "action":
        column = column.astype(np.float32).reshape(len(column), -1)
        column[ends - 1] = np.nan_to_num(column[ends - 1], nan=0.0)
    return column


Episode = Mapping[str, np.ndarray]
"""Column name -> one row for every frame."""


def is_complete(folder: Path, settings: Mapping[str, Any], versions: Mapping[str, str]) -> bool:
    """Say whether a store of these settings is there whole.

    Raises:
        UserError: the folder holds something else, or a store that other versions began.
    """
    file = folder / "dataset.yaml"
    if not file.is_file():
        if folder.exists() and any(not path.name.endswith(".partial") for path in folder.iterdir()):
            raise UserError(f"{folder} holds other files and no dataset.yaml: give an empty folder")
        return False
    found = read_yaml(file)
    if "settings" not in found:
        raise UserError(f"{file} is no description of a dataset: give an empty folder")
    for name in sorted({*settings, *found["settings"]}):
        there, asked = found["settings"].get(name), settings.get(name)
        if there != asked:
            raise UserError(f"{folder} holds a dataset with {name} {there!r}, not {asked!r}")
    if "action" not in found and found["versions"] != versions:
        raise UserError(
            f"{folder} was begun with {found['versions']}, here is {versions}: delete it, or "
            "finish it with those versions"
        )
    return "action" in found


def write_store(
    folder: Path,
    description: Mapping[str, Any],
    make: Callable[[list[int]], Iterator[Episode]],
    total: int,
    *,
    shard_episodes: int,
    jpeg: bool,
    doing: str,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Write a folder of shards, or what an interrupted command left out.

    Args:
        folder: Where; `is_complete` has seen that nothing else is there.
        description: What `dataset.yaml` says; the statistics of the actions come last.
        make: Yields the episodes of these numbers, in order.
        total: Number of episodes.
        shard_episodes: Episodes of a shard.
        jpeg: Store frames as JPEG.
        doing: What the progress bar says.
        share: The number of this process and how many write shards in turn; the first also writes
            the description, and waits for the others.
    """
    number, processes = share
    if number == 0:
        _write_yaml(folder, description)
    ranges = {
        folder / f"shard-{first // shard_episodes:05d}.h5": range(first, total)[:shard_episodes]
        for first in range(0, total, shard_episodes)
    }
    own = dict(list(ranges.items())[number::processes])
    todo = {path: indices for path, indices in own.items() if not path.exists()}
    wanted = [index for indices in todo.values() for index in indices]
    episodes, count = make(wanted), sum(map(len, own.values()))
    with tqdm(
        desc=doing,
        total=count,
        initial=count - len(wanted),
        unit="episode",
        disable=number > 0,
    ) as progress:
        for path, indices in todo.items():
            write_shard(path, _counted(islice(episodes, len(indices)), progress), jpeg=jpeg)
    if number > 0:
        return
    while not all(path.exists() for path in ranges):
        time.sleep(0.1)
    data = Trajectories(folder, columns=["action"])
    action = {"mean": data.action_mean.tolist(), "std": data.action_std.tolist()}
    _write_yaml(folder, {**description, "action": action})


def wait_until_begun(folder: Path) -> None:
    """Wait until another process has begun to write a store."""
    while not (folder / "dataset.yaml").is_file():
        time.sleep(0.1)


def _counted(episodes: Iterable[Episode], progress: tqdm) -> Iterator[Episode]:
    """Yield episodes, each seen by a progress bar."""
    for episode in episodes:
        progress.update()
        yield episode


def _write_yaml(folder: Path, description: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial_file = folder / "dataset.yaml.partial"
    partial_file.write_text(yaml.safe_dump(dict(description), sort_keys=False))
    partial_file.replace(folder / "dataset.yaml")


def write_shard(path: Path, episodes: Iterable[Episode], *, jpeg: bool = False) -> None:
    """Write episodes as one file, whole or not at all; frames of one at a time are in memory.

    With `jpeg`, frames are stored as JPEG of quality 95: 4 to 6 times smaller, slower to read.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        _write_columns(partial, episodes, jpeg)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_columns(path: Path, episodes: Iterable[Episode], jpeg: bool) -> None:
    columns: dict[str, list[np.ndarray]] = {}
    with h5py.File(path, "w") as file:
        for episode in episodes:
            for name, rows in episode.items():
                if name == "pixels":
                    _append_frames(file, rows, jpeg)
                else:
                    columns.setdefault(name, []).append(rows)
        for name, parts in columns.items():
            file.create_dataset(name, data=np.concatenate(parts))
        lengths = np.array([len(rows) for rows in columns["action"]], np.int64)
        file.create_dataset("ep_len", data=lengths.astype(np.int32))
        file.create_dataset("ep_offset", data=np.cumsum(lengths) - lengths)


def _append_frames(file: h5py.File, frames: np.ndarray, jpeg: bool) -> None:
    row = frames.shape[1:]
    if jpeg and row[-1] not in (1, 3):
        raise UserError(f"frames have {row[-1]} channels, JPEG has 1 or 3: store them without it")
    if "pixels" not in file:
        shape = () if jpeg else row
        dtype = h5py.vlen_dtype(np.uint8) if jpeg else np.uint8
        options: Any = {"maxshape": (None, *shape), "chunks": (1, *shape), "dtype": dtype}
        file.create_dataset("pixels", (0, *shape), **options)
        if jpeg:
            file["pixels"].attrs["shape"] = row
    column: Any = file["pixels"]
    first = len(column)
    column.resize(first + len(frames), axis=0)
    if not jpeg:
        column[first:] = frames
        return
    for number, frame in enumerate(frames, first):
        memory = io.BytesIO()
        picture = Image.fromarray(frame[..., 0] if row[-1] == 1 else frame)
        picture.save(memory, "JPEG", quality=95, subsampling=0)
        column[number] = np.frombuffer(memory.getvalue(), np.uint8)
