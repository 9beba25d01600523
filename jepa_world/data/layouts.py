"""Layouts that datasets of trajectories come in, each read as one kind of table.

    LeWorldModel  HDF5: pixels, action, ... with ep_len and ep_offset; stable-worldmodel's and ours
    robomimic     HDF5: data/demo_0/obs/..., actions, ...
    D4RL          HDF5: observations, actions, terminals, timeouts, infos/...
    Minari        data/main_data.hdf5: episode_0/observations, actions, ...; or Arrow, Parquet
    LeRobot       v2.0, v2.1, v3.0: meta/info.json, parquet, and mp4 or embedded pictures
    OGBench       npz: observations, actions, terminals
    videos        NAME.mp4 beside NAME.npz, a pair an episode

A table has one row for every frame, episodes one after another. The action of a row leads to the
next one; where a file has none for the last frame of an episode, it is zero. Nothing is read before
it is asked for, but what the episodes and the columns are. docs/datasets.md names the sources.
"""

import io
import logging
import lzma
import math
import re
import shutil
import struct
import tempfile
import warnings
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from einops import rearrange
from jaxtyping import Int
from PIL import Image

from jepa_world.data.files import require_room
from jepa_world.data.video import read_video, video_times
from jepa_world.registry import UserError

log = logging.getLogger(__name__)

ReadFrames = Callable[[int, int, int], np.ndarray]
"""First row, last row + 1, step -> bytes (n, h, w, c)."""
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Pictures:
    """A column of pictures: its rows, the (h, w, c) of one, and what opens a reader of them."""

    rows: int
    shape: Shape
    open: Callable[[], ReadFrames]


@dataclass(frozen=True)
class Table:
    """Episodes one after another: columns of numbers by name, and columns of pictures."""

    path: Path
    lengths: Int[np.ndarray, " e"]
    numbers: dict[str, Callable[[], np.ndarray]]
    pictures: dict[str, Pictures]

    def __post_init__(self) -> None:
        if len(self.lengths) == 0:
            raise UserError(f"{self.path} has no episodes")
        if (self.lengths <= 0).any():
            empty = int(np.argmax(self.lengths <= 0))
            raise UserError(f"{self.path}: episode {empty} has no frames")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one line that a file is damaged, whichever library finds it out."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except _DAMAGES as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or cut short ({what})") from error


_DAMAGES = (  # what the libraries raise of bytes that nobody wrote
    *(OSError, EOFError, ValueError, RuntimeError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, MemoryError, SyntaxError, StopIteration, struct.error),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, Image.DecompressionBombError),
)


# HDF5


def open_hdf5(path: Path) -> tuple[str, list[Table]]:
    """Open an HDF5 file, told by what its root holds."""
    with reading(path), h5py.File(path, "r") as file:
        for key, (layout, open_table) in _HDF5_LAYOUTS.items():
            if key in file:
                return layout, [open_table(path, file)]
        there = ", ".join(file) or "nothing"
    known = ", ".join(f"{key} ({layout})" for key, (layout, _) in _HDF5_LAYOUTS.items())
    raise UserError(f"{path} is HDF5 of no layout known here: it has {there}; expected {known}")


def _columns_table(path: Path, file: Any) -> Table:
    """Open the layout of LeWorldModel: whole columns, and the frames of every episode."""
    lengths = np.asarray(_rows(path, _dataset(file, "ep_len")), np.int64)
    columns = {k: v for k, v in _leaves(file).items() if k not in ("ep_len", "ep_offset")}
    table = _flat_table(path, lengths, columns)
    offsets = np.cumsum(lengths) - lengths
    given = _rows(path, _dataset(file, "ep_offset")) if "ep_offset" in file else offsets
    if not np.array_equal(given, offsets):
        raise UserError(f"{path}: ep_offset does not follow from ep_len")
    return table


def _d4rl_table(path: Path, file: Any) -> Table:
    """Open the layout of D4RL: arrays of all steps, cut where `terminals` or `timeouts` say so."""
    require(path, ("observations", "actions", "terminals"), file)
    columns = {
        key: dataset
        for key, dataset in _leaves(file).items()
        if "/" not in key or key.startswith("infos/")
    }
    ends = [_rows(path, _dataset(file, k)) for k in ("terminals", "timeouts") if k in file]
    columns = {k: v for k, v in columns.items() if k != "next_observations"}
    return _flat_table(path, _lengths(path, ends, len(columns["observations"])), columns)


def _flat_table(path: Path, lengths: np.ndarray, columns: Mapping[str, Any]) -> Table:
    numbers: dict[str, Callable[[], np.ndarray]] = {}
    pictures: dict[str, Pictures] = {}
    for key, dataset in columns.items():
        if (shape := _hdf5_picture_shape(dataset)) is not None:
            opens = partial(_open_hdf5_pictures, path, [key], np.array([len(dataset)]))
            pictures[key] = Pictures(len(dataset), shape, opens)
        else:
            numbers[key] = partial(_read_hdf5, path, key)
    return Table(path, lengths, numbers, pictures)


def _read_hdf5(path: Path, key: str) -> np.ndarray:
    with reading(path), h5py.File(path, "r") as file:
        return _rows(path, _dataset(file, key))


def _rows(path: Path, dataset: Any) -> np.ndarray:
    """Return all rows of a dataset that fit in memory."""
    require_room(f"{path}: {dataset.name}", dataset.shape, dataset.dtype.itemsize)
    return np.asarray(dataset)


def _lengths(path: Path, ends: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """Return the frames of each episode from flags that are set at its last one.

    Rows behind the last flag are an episode that was not finished.
    """
    for flags in ends:
        if flags.size != rows:
            raise UserError(f"{path}: {rows} observations, but {flags.size} marks of an end")
    last = np.any([flags.reshape(-1) for flags in ends], axis=0)
    stops = np.union1d(np.flatnonzero(last) + 1, [rows])
    return np.diff(stops, prepend=0)


def _robomimic_table(path: Path, file: Any) -> Table:
    """Open the layout of robomimic: a group a demonstration."""
    groups = _numbered(path, file["data"], "demo")
    require(path, ("obs", "actions"), file[f"data/{groups[0]}"], f"data/{groups[0]}/")
    groups = [f"data/{group}" for group in groups]
    lengths = np.array([len(_dataset(file, f"{group}/actions")) for group in groups], np.int64)
    return _grouped_table(path, file, groups, lengths)


def _minari_table(path: Path, file: Any) -> Table:
    """Open the layout of Minari: a group an episode, which has one observation more than steps."""
    groups = _numbered(path, file, "episode")
    require(path, ("observations", "actions"), file[groups[0]], f"{groups[0]}/")
    first = next(key for key in _leaves(file[groups[0]]) if key.startswith("observations"))
    lengths = np.array([len(_dataset(file, f"{group}/{first}")) for group in groups], np.int64)
    return _grouped_table(path, file, groups, lengths)


def _grouped_table(path: Path, file: Any, groups: list[str], lengths: np.ndarray) -> Table:
    numbers: dict[str, Callable[[], np.ndarray]] = {}
    pictures: dict[str, Pictures] = {}
    for key, dataset in _leaves(file[groups[0]]).items():
        names = [f"{group}/{key}" for group in groups]
        if key.startswith("next_obs/") or dataset.ndim == 0:
            continue
        if (shape := _hdf5_picture_shape(dataset)) is not None:
            counts = np.array([len(_dataset(file, name)) for name in names])
            _check_rows(path, names, counts, lengths)
            opens = partial(_open_hdf5_pictures, path, names, lengths)
            pictures[key] = Pictures(int(lengths.sum()), shape, opens)
        else:
            numbers[key] = partial(_read_groups, path, names, lengths)
    return Table(path, lengths, numbers, pictures)


def _read_groups(path: Path, names: list[str], lengths: np.ndarray) -> np.ndarray:
    """Return the rows of a column whose episodes lie in groups; a last one left out is zero."""
    with reading(path), h5py.File(path, "r") as file:
        parts = [_rows(path, _dataset(file, name)) for name in names]
    short = [len(part) == length - 1 for part, length in zip(parts, lengths, strict=True)]
    parts = [_with_last(part) if s else part for part, s in zip(parts, short, strict=True)]
    _check_rows(path, names, np.array([len(part) for part in parts]), lengths)
    return np.concatenate(parts)


def _with_last(steps: np.ndarray) -> np.ndarray:
    """Return the rows of all steps, and a zero for the frame that no step follows."""
    return np.concatenate([steps, np.zeros_like(steps, shape=(1, *steps.shape[1:]))])


def _check_rows(path: Path, names: Sequence[str], counts: np.ndarray, lengths: np.ndarray) -> None:
    for name, count, length in zip(names, counts, lengths, strict=True):
        if count != length:
            raise UserError(f"{path}: {name} has {count} rows, expected {length}: one a frame")


def _numbered(path: Path, groups: Any, word: str) -> list[str]:
    """Return the names `<word>_<number>` in the order of their numbers."""
    groups = groups if isinstance(groups, h5py.Group) else []
    names = [name for name in groups if re.fullmatch(rf"{word}_\d+", name)]
    if not names:
        raise UserError(f"{path} has no group {word}_0, but: {', '.join(groups) or 'nothing'}")
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def require(path: Path, names: Sequence[str], known: Any, where: str = "") -> None:
    """Refuse a file or group that lacks one of these names."""
    for name in names:
        if name not in known:
            there = ", ".join(sorted(known))
            raise UserError(f"{path} has no {where + name!r}; there: {there}")


def _dataset(file: Any, name: str) -> Any:
    """Return a dataset of rows that can be read."""
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim == 0:
        raise UserError(f"{file.filename} has no {name!r}, which other episodes have")
    _require_own(dataset, file.file.filename)
    _require_filters(dataset)
    return dataset


def _require_own(dataset: Any, filename: str) -> None:
    """Refuse rows that lie in another file: a dataset of others would read any file here."""
    if dataset.file.filename != filename or dataset.external or dataset.is_virtual:
        raise UserError(f"{filename}: {dataset.name} lies in another file: copy its rows in")


def _leaves(group: Any) -> dict[str, Any]:
    """Return the datasets of a group and below it, by their paths."""
    found: dict[str, Any] = {}

    def note(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            _require_own(item, group.file.filename)
            found[name] = item

    group.visititems(note)
    return found


def _hdf5_picture_shape(dataset: Any) -> Shape | None:
    """Return the (h, w, c) of the pictures in a dataset, None if it holds none."""
    if not dataset.shape or len(dataset) == 0 or not _is_bytes(dataset):
        return None
    _require_filters(dataset)
    if not _is_encoded(dataset):
        return picture_shape(dataset.shape[1:], dataset.dtype)
    height, width, channels = decoded(dataset[0]).shape
    return int(height), int(width), int(channels)


def picture_shape(row: tuple[int, ...], dtype: Any) -> Shape | None:
    """Return the (h, w, c) of rows that are pictures in bytes: (h, w, c), (c, h, w) or (h, w)."""
    if dtype != np.uint8 or len(row) not in (2, 3) or min(row) == 0:
        return None
    if len(row) == 2:
        return (row[0], row[1], 1) if min(row) >= SMALLEST else None
    first, second, third = row
    return (second, third, first) if first < third else (first, second, third)


SMALLEST = 8  # pixels: two axes of bytes are a grey picture from here on


def _is_bytes(dataset: Any) -> bool:
    return np.uint8 in (dataset.dtype, h5py.check_vlen_dtype(dataset.dtype))


def _is_encoded(dataset: Any) -> bool:
    """Say whether rows are JPEG or PNG: byte strings, of one length where all happen to have it."""
    if dataset.dtype != np.uint8:
        return True
    return dataset.ndim == 2 and dataset[0, :3].tobytes() in (b"\xff\xd8\xff", b"\x89PN")


def decoded(data: Any) -> np.ndarray:
    """Return the picture of JPEG or PNG bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # PIL refuses real bombs
        opened = Image.open(io.BytesIO(data))
    with opened as picture:
        pixels = np.asarray(picture if picture.mode in ("RGB", "L") else picture.convert("RGB"))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _require_filters(dataset: Any) -> None:
    """Make what a dataset is compressed with available, of the package hdf5plugin if need be."""
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(i) for i in range(properties.get_nfilters())]
    for code, _, _, name in filters:
        if h5py.h5z.filter_avail(code):
            continue
        try:
            import_module("hdf5plugin")
        except ImportError as error:
            raise UserError(
                f"{dataset.file.filename}: {dataset.name} is compressed by filter {code} "
                f"({name.decode() or 'without a name'}): pip install hdf5plugin"
            ) from error


def _open_hdf5_pictures(path: Path, names: Sequence[str], rows: np.ndarray) -> ReadFrames:
    file = h5py.File(path, "r")
    readers: dict[int, ReadFrames] = {}

    def read(segment: int, first: int, last: int, step: int) -> np.ndarray:
        if segment not in readers:
            readers[segment] = _hdf5_frames(_dataset(file, names[segment]))
        return readers[segment](first, last, step)

    return over_segments(rows, read)


def _hdf5_frames(dataset: Any) -> ReadFrames:
    """Return a reader of one dataset, whichever way its pictures are laid out."""
    encoded = _is_encoded(dataset)
    row = dataset.shape[1:]

    def read(first: int, last: int, step: int) -> np.ndarray:
        stored = dataset[first:last][::step]  # a strided selection in HDF5 is slower
        if encoded:
            return np.stack([decoded(data) for data in stored])
        return channels_last(stored, row)

    return read


def channels_last(stored: np.ndarray, row: tuple[int, ...]) -> np.ndarray:
    """Return pictures whose rows are (h, w, c), (c, h, w) or (h, w) as (n, h, w, c)."""
    if len(row) == 2:
        return stored[..., None]
    return rearrange(stored, "n c h w -> n h w c") if row[0] < row[2] else stored


def over_segments(rows: np.ndarray, read: Callable[[int, int, int, int], np.ndarray]) -> ReadFrames:
    """Return a reader of all rows, from one of the rows of a segment (a file or an episode)."""
    ends = np.cumsum(rows).tolist()
    begins = [0, *ends]

    def read_all(first: int, last: int, step: int) -> np.ndarray:
        parts: list[np.ndarray] = []
        while first < last:
            segment = bisect_right(ends, first)
            begin, end = begins[segment], min(last, ends[segment])
            parts.append(read(segment, first - begin, end - begin, step))
            first += step * len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return read_all


# Files of numpy, and videos beside them


def _npz(path: Path) -> tuple[str, list[Table]]:
    """Open the layout of OGBench, as its files are or with the `valids` of its compact form."""
    with reading(path), zipfile.ZipFile(path) as archive:
        arrays = {
            name.removesuffix(".npy"): _Array.of(archive, name)
            for name in archive.namelist()
            if name.endswith(".npy")
        }
    require(path, ("observations", "actions", "terminals"), arrays)
    ends = np.asarray(_read_npz(path, "terminals"))
    if "valids" in arrays:  # there the last two steps of an episode are terminal
        ends = _read_npz(path, "valids") == 0
    lengths = _lengths(path, [ends], arrays["observations"].shape[0])
    numbers: dict[str, Callable[[], np.ndarray]] = {}
    pictures: dict[str, Pictures] = {}
    for key, array in arrays.items():
        if (shape := picture_shape(array.shape[1:], array.dtype)) is not None:
            pictures[key] = Pictures(
                array.shape[0], shape, partial(_open_npz_pictures, path, array)
            )
        elif array.shape:
            numbers[key] = partial(_read_npz, path, key)
    return "OGBench", [Table(path, lengths, numbers, pictures)]


@dataclass(frozen=True)
class _Array:
    """An array in an .npz: where its numbers begin, in the file or in what is unpacked."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    order: Any
    offset: int | None
    """None where they are compressed."""

    @classmethod
    def of(cls, archive: zipfile.ZipFile, name: str) -> "_Array":
        info = archive.getinfo(name)
        with archive.open(info) as member:
            shape, fortran, dtype = _npy_header(member)
            begin = member.tell()
        if dtype.hasobject or min(shape, default=1) < 0:
            raise ValueError(f"{name} holds objects, or less than nothing")
        with open(str(archive.filename), "rb") as file:
            file.seek(info.header_offset + 26)  # of a local header of zip: lengths of two names
            begin += info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        stored = info.compress_type == zipfile.ZIP_STORED
        return cls(name, shape, dtype, "F" if fortran else "C", begin if stored else None)


def _npy_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the head of an array in numpy's format: its shape, order and type."""
    if np.lib.format.read_magic(member) == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def _read_npz(path: Path, key: str) -> np.ndarray:
    with reading(path), zipfile.ZipFile(path) as archive:
        array = _Array.of(archive, f"{key}.npy")
        require_room(f"{path}: {key}", array.shape, array.dtype.itemsize)
    with reading(path), np.load(path) as file:
        return file[key]


def _open_npz_pictures(path: Path, array: _Array) -> ReadFrames:
    """Map pictures: in place, or unpacked once into a temporary file where they are compressed."""
    row = array.shape[1:]
    if array.offset is not None:
        pictures = np.memmap(path, array.dtype, "r", array.offset, array.shape, array.order)
    else:
        with _unpacked(path, array) as file:  # the map outlives it
            pictures = np.memmap(file, array.dtype, "r", 0, array.shape, array.order)
    return lambda first, last, step: channels_last(pictures[first:last:step], row)


def _unpacked(path: Path, array: _Array) -> IO[bytes]:
    """Return a nameless temporary file that holds the numbers of an array."""
    left = math.prod(array.shape)
    size, free = left / 2**30, shutil.disk_usage(tempfile.gettempdir()).free
    if left > free:
        raise UserError(
            f"{path} holds {size:.1f} GiB of pictures, more than there is room for in "
            f"{tempfile.gettempdir()}: set TMPDIR to where there is"
        )
    if size > 1:
        log.warning("%s is compressed: unpacking %.1f GiB of pictures for a while", path, size)
    file = tempfile.TemporaryFile()
    with zipfile.ZipFile(path) as archive, archive.open(array.name) as member:
        _npy_header(member)
        try:
            while left > 0 and (content := member.read(min(left, 2**20))):
                left -= file.write(content)
            file.flush()
        except OSError as error:
            raise UserError(
                f"{path} cannot be unpacked into {tempfile.gettempdir()}: {error}; set TMPDIR to "
                "where there is room"
            ) from error
    return file


def _video(path: Path) -> tuple[str, list[Table]]:
    """Open a video of one episode and the .npz beside it."""
    npz = path.with_suffix(".npz")
    if not npz.is_file():
        raise UserError(f"{path} has no {npz.name} beside it with its actions")
    with reading(npz), np.load(npz) as file:
        names = list(file)
    times = video_times(path)
    lengths = np.array([len(times)])
    numbers = {name: partial(_read_beside, npz, name, len(times)) for name in names}
    shape = read_video(path, times[:1]).shape[1:]
    opens = partial(open_videos, [path], np.zeros(1), lengths, times)
    return "videos", [Table(npz, lengths, numbers, {"pixels": Pictures(len(times), shape, opens)})]


def _read_beside(npz: Path, key: str, frames: int) -> np.ndarray:
    rows = _read_npz(npz, key)
    return _with_last(rows) if len(rows) == frames - 1 else rows


def open_videos(
    files: Sequence[Path], begins: np.ndarray, lengths: np.ndarray, times: np.ndarray
) -> ReadFrames:
    """Return a reader of episodes, each a stretch of a video that begins at a time of its own.

    Args:
        files: The video of every episode.
        begins: Seconds into it where the episode begins.
        lengths: Frames of every episode.
        times: Of every row, seconds from the beginning of its episode.
    """
    offsets = np.cumsum(lengths) - lengths

    def read(episode: int, first: int, last: int, step: int) -> np.ndarray:
        rows = slice(offsets[episode] + first, offsets[episode] + last, step)
        return read_video(files[episode], begins[episode] + times[rows])

    return over_segments(lengths, read)


_HDF5_LAYOUTS: dict[str, tuple[str, Callable[[Path, Any], Table]]] = {
    "ep_len": ("LeWorldModel", _columns_table),
    "data": ("robomimic", _robomimic_table),
    "episode_0": ("Minari", _minari_table),
    "observations": ("D4RL", _d4rl_table),
}
OPENERS: dict[str, Callable[[Path], tuple[str, list[Table]]]] = {
    ".h5": open_hdf5,
    ".hdf5": open_hdf5,
    ".npz": _npz,
    ".mp4": _video,
}
