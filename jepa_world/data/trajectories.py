"""Trajectories of an environment: frames, actions and states, episode after episode.

The store is a folder of HDF5 shards in the column layout that LeWorldModel and stable-worldmodel
users have, plus `dataset.yaml`. In every shard all episodes are concatenated along the first axis:

    pixels     (N, h, w, c) bytes, one frame a chunk; or N JPEG strings with the attribute `shape`
    action     (N, a)       action t leads from frame t to frame t + 1
    state ...  (N, ...)     further columns, one row for every frame
    ep_len     (episodes,)  frames of each episode
    ep_offset  (episodes,)  first row of each episode

An episode of T steps has T + 1 frames; the action at its last frame is zero. Foreign files may
have NaN there (read as zero), pixels as (N, c, h, w), or no `ep_offset`. A folder of `NAME.mp4`
beside `NAME.npz` (`action`, and further columns) reads as well, one episode a pair.
"""

import copy
import io
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image

from jepa_world.config import read_yaml
from jepa_world.data.video import read_video, video_times
from jepa_world.registry import UserError


class Trajectories:
    """Read windows of consecutive frames from a store; safe to use after a fork or a pickle.

    A set whose frames fit in `cache_bytes` is decoded into memory at the first read; a larger one
    is read from its files. `columns` names what a batch holds: by default pixels and action, and
    state and proprio where they are stored.

    Raises:
        UserError: nothing there, a damaged file, a column that is missing, episodes and frames
            that disagree, an episode without frames, a number that is not finite.

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
        columns: Sequence[str] | None = None,
        cache_bytes: int = 2 * 2**30,
    ):
        path = Path(path)
        self.path = path
        self.metadata = _read_metadata(path)
        parts = _open_parts(path, columns)
        _check_complete(path, self.metadata, sum(len(part.lengths) for part in parts))
        self._lengths = np.concatenate([part.lengths for part in parts])
        self._offsets = np.cumsum(self._lengths) - self._lengths
        self._columns = {
            name: np.concatenate([part.columns[name] for part in parts])
            for name in parts[0].columns
        }
        wanted = columns is None or "pixels" in columns
        self._frames = _Frames(parts, cache_bytes) if wanted else None
        self._episodes = np.arange(len(self._lengths))

    @property
    def env(self) -> str | None:
        """Return the Gymnasium id the dataset was collected in, where it says so."""
        return self.metadata.get("settings", {}).get("env")

    @property
    def num_episodes(self) -> int:
        """Count the episodes."""
        return len(self._episodes)

    @property
    def lengths(self) -> Int[np.ndarray, " e"]:
        """Return the frames of each episode (one more than its steps)."""
        return self._lengths[self._episodes]

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

    def read(
        self, starts: Int[np.ndarray, " b"], length: int, stride: int = 1
    ) -> dict[str, np.ndarray]:
        """Read windows by their first frames: columns (b, t, ...), pixels bytes (b, t, h, w, c).

        With a stride above 1, a step's action is its `stride` actions side by side, (b, t,
        stride * a), zero beyond the end of the episode.
        """
        starts = np.asarray(starts)
        rows = starts[:, None] + stride * np.arange(length)
        batch = {name: column[rows] for name, column in self._columns.items() if name != "action"}
        if "action" in self._columns:
            batch["action"] = self._actions(rows, stride)
        if self._frames is not None:
            batch["pixels"] = self._frames.read(starts, length, stride)
        return batch

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


def write_shard(
    path: Path, episodes: Sequence[Mapping[str, np.ndarray]], *, jpeg: bool = False
) -> None:
    """Write episodes (column name -> one row for every frame) as one shard, whole or not at all.

    With `jpeg`, frames are stored as JPEG of quality 95: 4 to 6 times smaller, slower to read.
    """
    lengths = np.array([len(episode["action"]) for episode in episodes], np.int64)
    partial = path.with_name(path.name + ".partial")
    with h5py.File(partial, "w") as file:
        for name in episodes[0]:
            rows = np.concatenate([episode[name] for episode in episodes])
            if name != "pixels":
                file.create_dataset(name, data=rows)
            elif jpeg:
                _write_jpeg(file, rows)
            else:
                file.create_dataset(name, data=rows, chunks=(1, *rows.shape[1:]))
        file.create_dataset("ep_len", data=lengths.astype(np.int32))
        file.create_dataset("ep_offset", data=np.cumsum(lengths) - lengths)
    os.replace(partial, path)


def _write_jpeg(file: h5py.File, frames: np.ndarray) -> None:
    column = file.create_dataset(
        "pixels", (len(frames),), dtype=h5py.vlen_dtype(np.uint8), chunks=(1,)
    )
    column.attrs["shape"] = frames.shape[1:]
    for row, frame in enumerate(frames):
        memory = io.BytesIO()
        Image.fromarray(frame).save(memory, "JPEG", quality=95, subsampling=0)
        column[row] = np.frombuffer(memory.getvalue(), np.uint8)


class _Part:
    """One HDF5 file, or one pair of video and .npz: its columns in memory, its frames on disk."""

    def __init__(
        self,
        path: Path,
        lengths: np.ndarray,
        columns: dict[str, np.ndarray],
        shape: tuple[int, int, int],
        open_frames: Callable[[Path], "_ReadFrames"],
    ):
        self.path, self.lengths, self.columns = path, lengths, columns
        self.shape, self.open_frames = shape, open_frames
        self.num_frames = int(lengths.sum())


_ReadFrames = Callable[[int, int, int], np.ndarray]  # first, last + 1, step -> frames (n h w c)


class _Frames:
    """The frames of all parts: one array in memory when it fits in `cache_bytes`, else files."""

    def __init__(self, parts: list[_Part], cache_bytes: int):
        self.shape = parts[0].shape
        for part in parts:
            if part.shape != self.shape:
                raise UserError(f"{part.path} has frames {part.shape}, the others {self.shape}")
        self._parts = parts
        self._ends = np.cumsum([part.num_frames for part in parts])
        self._fits = int(self._ends[-1]) * int(np.prod(self.shape)) <= cache_bytes
        self._cache: np.ndarray | None = None
        self._open: dict[int, _ReadFrames] = {}
        self._process = os.getpid()

    def read(self, starts: np.ndarray, length: int, stride: int) -> np.ndarray:
        """Return (b, t, h, w, c) bytes."""
        if self._fits:
            return self._whole()[starts[:, None] + stride * np.arange(length)]
        frames = np.empty((len(starts), length, *self.shape), np.uint8)
        parts = np.searchsorted(self._ends, starts, side="right")
        for row, (start, part) in enumerate(zip(starts, parts, strict=True)):
            first = int(start) - int(self._ends[part]) + self._parts[part].num_frames
            last = first + (length - 1) * stride + 1
            frames[row] = self._reader(int(part))(first, last, stride)
        return frames

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_cache": None}

    def _whole(self) -> np.ndarray:
        if self._cache is None:
            cache = np.empty((int(self._ends[-1]), *self.shape), np.uint8)
            for index, part in enumerate(self._parts):
                end = int(self._ends[index])
                cache[end - part.num_frames : end] = self._reader(index)(0, part.num_frames, 1)
                self._open.clear()
            self._cache = cache
        return self._cache

    def _reader(self, index: int) -> _ReadFrames:
        if self._process != os.getpid():  # an open HDF5 file does not survive a fork
            self._open, self._process = {}, os.getpid()
        if index not in self._open:
            part = self._parts[index]
            self._open[index] = part.open_frames(part.path)
        return self._open[index]


def _read_metadata(path: Path) -> dict[str, Any]:
    """Return dataset.yaml of a folder, or nothing where there is none."""
    file = path / "dataset.yaml"
    return read_yaml(file) if file.is_file() else {}


def _check_complete(path: Path, metadata: Mapping[str, Any], found: int) -> None:
    expected = metadata.get("settings", {}).get("episodes", found)
    if found != expected:
        raise UserError(
            f"{path} holds {found} of {expected} episodes: an interrupted collection; the command "
            "that began it finishes it"
        )


def _open_parts(path: Path, columns: Sequence[str] | None) -> list[_Part]:
    if not path.exists():
        raise UserError(f"dataset {path} does not exist")
    open_part, files = _open_hdf5, [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".h5", ".hdf5"))
    if not files:
        open_part, files = _open_video, sorted(path.glob("*.mp4"))
    if not files:
        _check_complete(path, _read_metadata(path), 0)
        raise UserError(f"dataset {path} has no .h5 file, and no .mp4 beside an .npz")
    first = open_part(files[0], columns)
    return [first, *(open_part(file, list(first.columns)) for file in files[1:])]


def _open_hdf5(path: Path, columns: Sequence[str] | None) -> _Part:
    try:
        with h5py.File(path, "r") as file:
            names = _chosen(path, columns, list(file))
            _require(path, ["pixels", "ep_len"], list(file))
            lengths = np.asarray(file["ep_len"], np.int64)
            offsets = np.asarray(file.get("ep_offset", np.cumsum(lengths) - lengths), np.int64)
            table = {name: np.asarray(file[name]) for name in names}
            pixels = cast(h5py.Dataset, file["pixels"])
            rows = {"pixels": len(pixels)} | {name: len(column) for name, column in table.items()}
            _check_episodes(path, lengths, offsets, rows)
            shape = _FrameReader(path, file).shape
    except OSError as error:
        raise UserError(
            f"{path} is damaged or cut short ({error}); delete it and collect it again"
        ) from error
    return _Part(path, lengths, _clean(path, table, lengths), shape, _open_frames)


def _chosen(path: Path, columns: Sequence[str] | None, known: list[str]) -> list[str]:
    """Return the columns to hold in memory: those asked for, or those of the contract."""
    if columns is None:
        columns = ["action", *(name for name in ("state", "proprio") if name in known)]
    names = [name for name in columns if name != "pixels"]
    _require(path, names, known)
    return names


def _require(path: Path, names: Sequence[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            there = ", ".join(sorted(known))
            raise UserError(f"{path} has no column {name!r}; columns there: {there}")


def _open_frames(path: Path) -> _ReadFrames:
    return _FrameReader(path, h5py.File(path, "r"))


class _FrameReader:
    """Frames of an HDF5 file, whichever way they are laid out, as (n, h, w, c) bytes."""

    def __init__(self, path: Path, file: h5py.File):
        self._column: Any = file["pixels"]
        self._jpeg = h5py.check_vlen_dtype(self._column.dtype) is not None
        if not self._jpeg and (self._column.dtype != np.uint8 or self._column.ndim != 4):
            kind = f"{self._column.dtype} {self._column.shape}"
            raise UserError(f"{path}: pixels are {kind}, expected bytes (N, h, w, c)")
        stored = self._column.attrs["shape"] if self._jpeg else self._column.shape[1:]
        self._channels_first = stored[0] < stored[2]
        first, second, third = (int(size) for size in stored)
        self.shape = (second, third, first) if self._channels_first else (first, second, third)

    def __call__(self, first: int, last: int, step: int) -> np.ndarray:
        stored = self._column[first:last][::step]  # a strided selection in HDF5 is slower
        if self._jpeg:
            return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in stored])
        return rearrange(stored, "n c h w -> n h w c") if self._channels_first else stored


def _open_video(path: Path, columns: Sequence[str] | None) -> _Part:
    npz = path.with_suffix(".npz")
    if not npz.is_file():
        raise UserError(f"{path} has no {npz.name} beside it with its actions")
    try:
        with np.load(npz) as file:
            names = _chosen(npz, columns, list(file))
            table = {name: file[name] for name in names}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{npz} cannot be read: {error}") from error
    times = video_times(path)
    if "action" in table and len(table["action"]) == len(times) - 1:
        table["action"] = np.pad(table["action"], ((0, 1), (0, 0)))
    lengths = np.array([len(times)])
    rows = {"pixels": len(times)} | {name: len(column) for name, column in table.items()}
    _check_episodes(npz, lengths, np.zeros(1, np.int64), rows)
    shape = read_video(path, times[:1]).shape[1:]
    return _Part(path, lengths, _clean(npz, table, lengths), shape, _open_video_frames)


def _open_video_frames(path: Path) -> _ReadFrames:
    times = video_times(path)
    return lambda first, last, step: read_video(path, times[first:last:step])


def _check_episodes(
    path: Path, lengths: np.ndarray, offsets: np.ndarray, rows: Mapping[str, int]
) -> None:
    """Refuse episodes that are empty, or do not tile the rows of every column."""
    if len(lengths) == 0:
        raise UserError(f"{path} has no episodes")
    if (lengths <= 0).any():
        raise UserError(f"{path}: episode {int(np.argmax(lengths <= 0))} has no frames")
    for name, count in rows.items():
        if count != lengths.sum():
            raise UserError(f"{path}: {name} has {count} rows, ep_len sums to {lengths.sum()}")
    if not np.array_equal(offsets, np.cumsum(lengths) - lengths):
        raise UserError(f"{path}: ep_offset does not follow from ep_len")


def _clean(
    path: Path, columns: dict[str, np.ndarray], lengths: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the columns, NaN in the action at a last frame as zero; refuse any other."""
    ends = np.cumsum(lengths)
    if "action" in columns:
        columns["action"] = action = columns["action"].astype(np.float32)
        action[ends - 1] = np.nan_to_num(action[ends - 1], nan=0.0)
    for name, column in columns.items():
        if not np.issubdtype(column.dtype, np.number):
            raise UserError(f"{path}: column {name!r} is {column.dtype}, expected numbers")
        bad = ~np.isfinite(column.reshape(len(column), -1)).all(1)
        if bad.any():
            row = int(np.argmax(bad))
            episode = int(np.searchsorted(ends, row, side="right"))
            step = row - int(ends[episode] - lengths[episode])
            raise UserError(f"{path}: {name} is not finite in episode {episode}, row {step}")
    return columns
