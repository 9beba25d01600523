"""Labelled images in memory: idx files, folders, tars, and generated shapes with known factors.

    path/train-images-idx3-ubyte[.gz] ...   the files of MNIST and Fashion-MNIST
    path/CLASS/name.png                     or path/train/CLASS/name.png beside path/test/...
    path.tar[.gz]                           the same tree in one file
    shapes                                  generated: the default, nothing is read

A reader returns `(train, test)`. Bytes, channels last; pictures of other sizes are scaled and cut.
"""

import gzip
import io
import lzma
import math
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch.utils.data import get_worker_info

from jepa_world.data.files import (
    BAD_SHARE,
    Member,
    Skipped,
    memory,
    note_reading,
    require_room,
    tar_members,
)
from jepa_world.data.shards import LISTED, Shards, shared_labels
from jepa_world.registry import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}
UNREADABLE = (  # what PIL raises
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    *(TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError),
    Image.DecompressionBombError,
)
LARGEST = 2**28  # bytes of a file that may be a picture
SMALLEST = 8  # pixels a side: less is an icon or a mistake


@dataclass(frozen=True)
class Images:
    """Pictures of one size and what is known about them.

    Example:
        >>> images = make_shapes(16, seed=0)
        >>> images.pixels.shape, sorted(images.classes), sorted(images.values)
        ((16, 32, 32, 3), ['colour', 'shape', 'texture'], ['position', 'rotation', 'size'])
    """

    pixels: UInt8[np.ndarray, "n hh ww c"]
    classes: dict[str, Int[np.ndarray, " n"]] = field(default_factory=dict)
    """Labels by the name of what they tell: `class` for data sets that have one."""
    values: dict[str, Float[np.ndarray, "n k"]] = field(default_factory=dict)
    """Continuous factors by name."""
    skipped: Skipped = field(default_factory=lambda: Skipped(0, "pictures"))
    """Files that could not be read."""

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: Int[np.ndarray, " b"]) -> "Images":
        """Return some of the images."""
        classes = {name: labels[index] for name, labels in self.classes.items()}
        values = {name: factor[index] for name, factor in self.values.items()}
        return Images(self.pixels[index], classes, values, self.skipped)


@dataclass(frozen=True)
class Pictures:
    """Pictures of shards, decoded when they are asked for."""

    shards: Shards
    size: int
    """Side in pixels: the middle square is scaled to it."""
    skipped: Skipped
    """Those that could not be read; shards and members that are left out."""
    notes: Path | None = None
    """Folder in which the workers of a loader note what they read, if there is one."""

    def __len__(self) -> int:
        return len(self.shards)

    def noting(self, folder: Path) -> "Pictures":
        """Return pictures that note in a folder what they read and what they skip."""
        self.skipped.record = folder / "skipped.jsonl"
        return replace(self, notes=folder)

    def draw(
        self, index: Int[np.ndarray, " b"], *, seed: int, step: int
    ) -> tuple[UInt8[np.ndarray, "b hh ww c"], Int[np.ndarray, " b"]]:
        """Decode pictures.

        The place of one that cannot be read is taken by another, a function of (seed, step, index).

        Returns:
            The pictures, and which they are: `index`, but for those that were replaced.

        Raises:
            UserError: too many cannot be read (`files.most_bad`).
        """
        pixels = np.empty((len(index), self.size, self.size, 3), np.uint8)
        drawn = index.copy()
        for i, sample in enumerate(index.tolist()):
            random = np.random.default_rng((seed, step, sample))
            while (picture := self._decoded(int(drawn[i]))) is None:
                drawn[i] = random.integers(len(self))
            pixels[i] = picture
        return pixels, drawn

    def _decoded(self, sample: int) -> UInt8[np.ndarray, "hh ww c"] | None:
        """Return a picture, or nothing if it cannot be read."""
        name = self.shards.names[sample]
        if self.notes is not None and get_worker_info() is not None:
            note_reading(self.notes, name)
        try:
            return _decode(_content(self.shards[sample]), self.size)
        except UNREADABLE as error:
            self.skipped.add(name, error)
        if len(self.skipped) >= len(self) and all(
            n in self.skipped.reasons for n in self.shards.names
        ):
            raise UserError(f"none of the {len(self)} pictures can be read")
        return None


def stream_images(
    shards: Shards, *, size: int, bad_share: float = BAD_SHARE
) -> tuple[Pictures, Images, Images]:
    """Return the pictures of shards, to be trained on, and two parts in memory, to measure on.

    The parts, 1000 at most each, with labels where there are any, are some of the first, and of
    whole shards that it does not have.

    Raises:
        UserError: there is one shard alone, some pictures have a label and some have none, or too
            many cannot be read.
    """
    training, held_out = shards.hold_out()
    skipped = Skipped(len(shards) + len(shards.refused), "pictures and shards", bad_share)
    skipped.add_all(shards.refused)
    streamed, other = (Pictures(part, size, skipped) for part in (training, held_out))
    drawn = [part.draw(part.shards.some(LISTED), seed=0, step=0) for part in (streamed, other)]
    labels = shared_labels([(training, drawn[0][1]), (held_out, drawn[1][1])])
    numbers = np.unique(labels, return_inverse=True)[1] if labels else None
    first = len(drawn[0][1])
    parts = [
        Images(pixels, {} if numbers is None else {"class": numbers[chosen]}, skipped=skipped)
        for (pixels, _), chosen in zip(drawn, (slice(first), slice(first, None)), strict=True)
    ]
    return streamed, parts[0], parts[1]


def _content(file: Path | Member) -> bytes:
    if isinstance(file, Path):
        return _opener(file)()
    if file.size > LARGEST:
        raise ValueError(f"more than {LARGEST} bytes")
    return file.read()


def load_images(
    path: Path, *, size: int = 64, bad_share: float = BAD_SHARE
) -> tuple[Images, Images]:
    """Read the training and the test part of an image data set.

    Args:
        path: `shapes`, a folder of idx files, a folder or a tar of pictures.
        size: Side that pictures of folders and tars are brought to; idx files keep theirs.
        bad_share: Of pictures that may be unreadable, beside the rule for small sets.

    Raises:
        UserError: nothing there, nothing readable, or too much of it damaged.
    """
    if path == Path("shapes") and not path.exists():
        return make_shapes(6000, seed=0), make_shapes(2000, seed=1)
    if path.is_dir() and list(path.glob("*-idx3-ubyte*")):
        return _read_idx_split(path, "train"), _read_idx_split(path, "t10k")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        named = ((file.relative_to(path).as_posix(), _opener(file)) for file in files)
        return _from_pictures(named, path, size, bad_share)
    if path.is_file():
        return _from_pictures(_tar_members(path), path, size, bad_share)
    raise UserError(f"no images at {str(path)!r}: give a folder, a tar, or `shapes`")


def hold_out(images: Images, *, share: float = 0.05, at_most: int = 5000) -> tuple[Images, Images]:
    """Split the training part once more, evenly, one at least: the test part stays untouched."""
    count = min(at_most, max(1, int(share * len(images))))
    chosen = np.zeros(len(images), bool)
    chosen[np.linspace(0, len(images) - 1, count).astype(int)] = True
    return images.take(np.flatnonzero(~chosen)), images.take(np.flatnonzero(chosen))


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """Read an idx file of bytes, compressed or not (the format of http://yann.lecun.com/exdb/mnist).

    Raises:
        UserError: the file is missing, is no idx file of bytes, or does not hold what it announces.
    """
    name = repr(str(path))
    try:
        with path.open("rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            shape = _idx_shape(file, name)
            announced = math.prod(shape)
            content = file.read(announced + 1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"idx file {name} cannot be read: {error}") from error
    if len(content) != announced:
        held = "more" if len(content) > announced else len(content)
        raise UserError(f"{name} announces {announced} bytes {shape} and holds {held}")
    return np.frombuffer(content, np.uint8).reshape(shape).copy()


def _idx_shape(file: IO[bytes] | gzip.GzipFile, name: str) -> tuple[int, ...]:
    """Read the head of an idx file of bytes."""
    head = file.read(4)
    if len(head) < 4 or head[:3] != b"\0\0\x08":
        raise UserError(f"{name} begins with {head.hex(' ')!r}: idx files begin with 00 00 08")
    shape = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
    require_room(name, shape, 2)  # and a copy
    return shape


def _read_idx_split(folder: Path, split: str) -> Images:
    pixels = read_idx(_idx_file(folder, f"{split}-images-idx3-ubyte"))
    labels = read_idx(_idx_file(folder, f"{split}-labels-idx1-ubyte"))
    if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
        raise UserError(
            f"{str(folder)!r}: {split} has images {pixels.shape} and labels {labels.shape}; "
            "expected (n, rows, columns) and (n)"
        )
    return Images(pixels[..., None], {"class": labels.astype(np.int64)})


def _idx_file(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{str(folder)!r} holds idx files but no {name} or {name}.gz")


Read = Callable[[], bytes]


def _opener(file: Path) -> Read:
    """Return what reads a file, unless it is larger than pictures are."""

    def read() -> bytes:
        if not file.is_file() or file.stat().st_size > LARGEST:
            raise ValueError(f"no file, or more than {LARGEST} bytes")
        return file.read_bytes()

    return read


def _tar_members(path: Path) -> Iterator[tuple[str, Read]]:
    """Yield the pictures of a tar in the order of their names."""
    try:
        with tarfile.open(path) as archive:
            for member in tar_members(archive, 0):
                if PurePosixPath(member.name).suffix.lower() in SUFFIXES:
                    yield member.name, partial(_read_member, archive, member)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a tar of pictures: {error}") from error


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None or member.size > LARGEST:
        raise ValueError(f"no file, or more than {LARGEST} bytes")
    return file.read()


def _from_pictures(
    named: Iterator[tuple[str, Read]], path: Path, size: int, bad_share: float
) -> tuple[Images, Images]:
    """Decode all pictures into memory.

    Raises:
        UserError: none there, too many damaged, or more than there is memory for.
    """
    names: list[str] = []
    pictures: list[UInt8[np.ndarray, "hh ww c"]] = []
    reasons: dict[str, str] = {}
    for name, read in named:
        try:
            pictures.append(_decode(read(), size))
            names.append(name)
        except UNREADABLE as error:
            reasons[name] = str(error)
        if len(pictures) * 3 * size**2 > memory() / 2:
            raise UserError(
                f"pictures in {str(path)!r} take more than half of the memory here: "
                f"--data '{path}/**' streams a folder, a pattern such as x-{{000..099}}.tar tars"
            )
    total = len(names) + len(reasons)
    if not total:
        raise UserError(f"no pictures in {str(path)!r}: looked for {' '.join(sorted(SUFFIXES))}")
    skipped = Skipped(total, f"pictures in {str(path)!r}", bad_share)
    skipped.add_all(reasons)
    return _split(np.stack(pictures), names, skipped)


def _decode(content: bytes, size: int) -> UInt8[np.ndarray, "hh ww c"]:
    """Return a picture as RGB on white, its middle square scaled to `size` pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # PIL refuses real bombs
        opened = Image.open(io.BytesIO(content))
    with opened as image:
        if min(image.size) < SMALLEST:
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, fewer than {SMALLEST}")
        image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.BOX, box))


def _split(
    pixels: UInt8[np.ndarray, "n hh ww c"], names: list[str], skipped: Skipped
) -> tuple[Images, Images]:
    """Split into train and test: by folders of these names, else every fifth picture of a class."""
    parts = [PurePosixPath(name.replace("\\", "/")).parts for name in names]
    parts = [path[1:] if path[0] == "." else path for path in parts]
    by_folder = {path[0] for path in parts} == {"train", "test"}
    kinds = [path[-2] if len(path) > 1 + by_folder else "" for path in parts]
    known, labels = np.unique(kinds, return_inverse=True)
    if by_folder:
        test = np.array([path[0] == "test" for path in parts])
    else:
        test = np.zeros(len(parts), bool)
        for label in range(len(known)):
            test[np.flatnonzero(labels == label)[4::5]] = True
    classes = {"class": labels.astype(np.int64)} if len(known) > 1 else {}
    images = Images(pixels, classes, skipped=skipped)
    return images.take(np.flatnonzero(~test)), images.take(np.flatnonzero(test))


SHAPES = ("ellipse", "square", "triangle", "cross", "half disc")
TEXTURES = ("plain", "stripes", "checks", "dots")
COLOURS = (
    *((230, 60, 50), (240, 180, 40), (70, 180, 70)),
    *((50, 170, 200), (70, 80, 210), (200, 80, 190)),
)


def make_shapes(count: int, *, seed: int, size: int = 32) -> Images:
    """Draw shapes of known colour, texture, size, rotation and position on noisy grey grounds.

    Classes: `shape`, `texture`, `colour`. Values: `size` (radius, .2 to .4 of the side), `rotation`
    (radians, within 30 degrees: no shape looks the same turned by that) and `position` (of the
    centre, row and column, .35 to .65 of the side).
    """
    random = np.random.default_rng(seed)
    classes = {
        "shape": random.integers(len(SHAPES), size=count),
        "texture": random.integers(len(TEXTURES), size=count),
        "colour": random.integers(len(COLOURS), size=count),
    }
    values = {
        "size": _uniform(random, 0.2, 0.4, count, 1),
        "rotation": _uniform(random, -np.pi / 6, np.pi / 6, count, 1),
        "position": _uniform(random, 0.35, 0.65, count, 2),
    }
    ground = _uniform(random, 0.3, 0.7, count, 1, 1, 1)
    slope = _uniform(random, -0.3, 0.3, count, 2, 1, 1)
    y, x = _local_coordinates(values, size)
    inside = _inside(classes["shape"], y, x)
    bright = _texture(classes["texture"], y, x)
    paint = (
        np.array(COLOURS, np.float32)[classes["colour"]][:, None, None] / 255 * bright[..., None]
    )
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    ground = ground + (slope[:, 0] * axis[:, None] + slope[:, 1] * axis)[..., None]
    noise = 0.04 * random.standard_normal((count, size, size, 3), np.float32)
    picture = np.where(inside[..., None], paint, ground) + noise
    pixels = np.round(picture.clip(0, 1) * 255).astype(np.uint8)
    return Images(pixels, classes, values)


def _local_coordinates(
    values: dict[str, Float[np.ndarray, "n k"]], size: int
) -> tuple[Float[np.ndarray, "n hh ww"], Float[np.ndarray, "n hh ww"]]:
    """Return every pixel's place (down, right) in units of the radius, in the shape's own frame."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    radius, angle = (values[name][:, :, None] for name in ("size", "rotation"))
    row, column = (values["position"][:, axis_, None, None] for axis_ in (0, 1))
    down, right = (axis[:, None] - row) / radius, (axis - column) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * down - sin * right, sin * down + cos * right


def _inside(shape: Int[np.ndarray, " n"], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Tell which pixels (n hh ww) belong to the shape."""
    across, along = np.abs(x), np.abs(y)
    inside = [
        (x / 0.6) ** 2 + y**2 < 1,
        np.maximum(across, along) < 0.75,
        (y < 0.6) & (y > 1.9 * across - 1),
        (np.minimum(across, along) < 0.3) & (np.maximum(across, along) < 0.95),
        (x**2 + y**2 < 1) & (y < 0.15),
    ]
    return np.choose(shape[:, None, None], inside)


def _texture(texture: Int[np.ndarray, " n"], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the brightness (n hh ww) of the paint."""
    waves = np.sin(8 * y), np.sin(8 * x)
    dark = [
        np.zeros(y.shape, bool),
        waves[0] > 0,
        waves[0] * waves[1] > 0,
        (waves[0] > 0.2) & (waves[1] > 0.2),
    ]
    return np.where(np.choose(texture[:, None, None], dark), np.float32(0.45), np.float32(1))


def _uniform(
    random: np.random.Generator, low: float, high: float, *shape: int
) -> Float[np.ndarray, "..."]:
    return low + (high - low) * random.random(shape, np.float32)
