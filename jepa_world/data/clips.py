"""Clips of video files: windows of time, cut to a square, a function of (seed, step, sample).

    path/CLASS/name.mp4       a folder: the folder a file lies in is its class
    path.tar                  the same tree in one file, not compressed; or a folder of such tars
    path.txt                  one file a line, and its label behind a space or a tab if there is one
    path.csv                  a header; the column `path`, and any number of columns of labels

Nothing is decoded before it is asked for, and nothing stays open, so a `Clips` can be sent to the
workers of a loader. Small sets are decoded once and kept in memory by `Clips.cached`.
"""

import csv
import dataclasses
import logging
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info

from jepa_world.data.files import (
    BAD_SHARE,
    NAMED,
    Member,
    Skipped,
    leaves,
    most_bad,
    note_reading,
    tar_members,
)
from jepa_world.data.shards import LISTED, Shards, shared_labels
from jepa_world.data.video import FORGIVEN, SUFFIXES, Source, Times, each_frame, open_video, upright
from jepa_world.registry import UserError, did_you_mean

Index = Int[np.ndarray, " b"]
Pixels = UInt8[np.ndarray, "b t hh ww c"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """All frames of a video in memory, the time each begins, and how long the video is."""

    frames: UInt8[np.ndarray, "t hh ww c"]
    starts: Times
    duration: float

    def read(self, times: Times) -> UInt8[np.ndarray, "t hh ww c"]:
        """Return the frames on screen at `times`; after the end, the last one."""
        shown = np.searchsorted(self.starts, times + FORGIVEN, side="right") - 1
        return self.frames[shown.clip(0)]


@dataclass(frozen=True)
class Clips:
    """Video files, and what is known about them.

    Example:
        >>> from jepa_world.data.video import write_video
        >>> for name in ("left/a.mp4", "right/b.mp4"):
        ...     write_video(f"/tmp/clips/{name}", np.zeros((20, 48, 64, 3), np.uint8), fps=10)
        >>> clips = load_clips(Path("/tmp/clips"))
        >>> clips.names, clips.classes["class"], clips.class_names["class"]
        (('left/a.mp4', 'right/b.mp4'), array([0, 1]), ('left', 'right'))
        >>> clips.read(np.array([0, 1]), frames=4, fps=5, size=32, seed=0, step=0).shape
        (2, 4, 32, 32, 3)
    """

    names: Sequence[str]
    files: Sequence[Path | Member]
    classes: dict[str, Int[np.ndarray, " n"]] = field(default_factory=dict)
    """Labels by the name of what they tell: `class` for folders."""
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The word of every label, where labels were words."""
    values: dict[str, Float[np.ndarray, "n k"]] = field(default_factory=dict)
    """Numbers by the name of their column."""
    skipped: Skipped = field(default_factory=lambda: Skipped(0, "videos"))
    """Files left out at once (missing, empty, named as if they lay outside their archive or list),
    and those that could not be read when they were asked for. All parts of a set share it."""
    backend: str = "pyav"
    """What decodes: `pyav`, `decord` or `torchcodec`."""
    decoded: tuple[Decoded, ...] = ()
    """Every video decoded, after `cached`."""
    notes: Path | None = None
    """Folder in which the workers of a loader note what they read, if there is one."""

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Index) -> "Clips":
        """Return some of the videos."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in index),
            files=tuple(self.files[i] for i in index),
            classes={name: labels[index] for name, labels in self.classes.items()},
            values={name: numbers[index] for name, numbers in self.values.items()},
            decoded=tuple(self.decoded[i] for i in index if self.decoded),
        )

    def noting(self, folder: Path) -> "Clips":
        """Return clips that note in a folder what they read and what they skip.

        Processes that read the same set know from there what the others skipped, and what one that
        died was reading.
        """
        self.skipped.record = folder / "skipped.jsonl"
        return dataclasses.replace(self, notes=folder)

    def read(
        self, index: Index, *, frames: int, fps: float, size: int, seed: int, step: int
    ) -> Pixels:
        """Return a random clip of every video: `draw` without the videos it drew from."""
        return self.draw(index, frames=frames, fps=fps, size=size, seed=seed, step=step)[0]

    def read_middle(self, index: Index, *, frames: int, fps: float, size: int) -> Pixels:
        """Return the clip in the middle of every video: `draw_middle` without the videos."""
        return self.draw_middle(index, frames=frames, fps=fps, size=size)[0]

    def draw(
        self, index: Index, *, frames: int, fps: float, size: int, seed: int, step: int
    ) -> tuple[Pixels, Index]:
        """Draw a random clip of every video.

        It begins at a time uniform over those that leave room for it, a function of (seed, step,
        index in the data) alone. Where a video is shorter, its last frame is repeated. The middle
        square of a frame is scaled to `size`. The place of a video that cannot be read is taken by
        another, drawn from the same numbers.

        Args:
            index: Numbers of the videos.
            frames: Frames of a clip.
            fps: Frames a second of a clip, whatever the video's own.
            size: Side of the square in pixels.
            seed: First part of the random state.
            step: Second part of it.

        Returns:
            The clips, and the videos they are of: `index`, but for those that were replaced.

        Raises:
            UserError: too many videos cannot be read (`files.most_bad`).
        """
        cut = _Cut(frames, fps, size)
        numbers = [np.random.default_rng((seed, step, sample)) for sample in index.tolist()]
        return self._cut_all(index, cut, numbers, lambda random: random.random())

    def draw_middle(
        self, index: Index, *, frames: int, fps: float, size: int
    ) -> tuple[Pixels, Index]:
        """Cut the clip in the middle of every video; the rest is as in `draw`."""
        numbers = [np.random.default_rng((0, 0, sample)) for sample in index.tolist()]
        return self._cut_all(index, _Cut(frames, fps, size), numbers, lambda random: 0.5)

    def cached(self, *, size: int, at_most: int = 4 * 1024**3) -> "Clips":
        """Decode every video once and keep its frames, in squares of `size` pixels, in memory.

        Clips read from it are those read from the files. A video that cannot be read is left out.

        Args:
            size: Side of the square in pixels; clips have to be read at the same one.
            at_most: Bytes the frames may take.

        Raises:
            UserError: they take more, or too many videos cannot be read.
        """
        kept: list[int] = []
        decoded: list[Decoded] = []
        left = at_most
        for sample in range(len(self)):
            try:
                decoded.append(self._decode(sample, size, left))
                kept.append(sample)
            except UserError as error:
                self._note_bad(sample, error)
                continue
            left -= decoded[-1].frames.nbytes
            if left < 0:
                raise UserError(
                    f"the first {len(kept)} of {len(self)} videos at {size} pixels take more than "
                    f"{at_most} bytes: raise the limit, lower the size, or read from the files"
                )
        chosen = self.take(np.array(kept, int))
        return dataclasses.replace(chosen, decoded=tuple(decoded))

    def complaint(self, sample: int) -> str:
        """Return why the header of a video cannot be read; nothing if it can."""
        try:
            with open_video(self._source(sample), name=self._name(sample)):
                return ""
        except UserError as error:
            return str(error)

    def _cut_all(
        self,
        index: Index,
        cut: "_Cut",
        numbers: list[np.random.Generator],
        place: Callable[[np.random.Generator], float],
    ) -> tuple[Pixels, Index]:
        """Cut one clip a sample; `place` is where it begins, from 0 (first) to 1 (last)."""
        if self.decoded and self.decoded[0].frames.shape[1] != cut.size:
            side = self.decoded[0].frames.shape[1]
            raise UserError(f"clips of {cut.size} pixels were asked for, {side} are in memory")
        pixels = np.empty((len(index), cut.frames, cut.size, cut.size, 3), np.uint8)
        drawn = index.copy()
        for i, random in enumerate(numbers):
            while True:
                try:
                    pixels[i] = self._cut(int(drawn[i]), cut, place(random))
                    break
                except UserError as error:
                    self._note_bad(int(drawn[i]), error)
                    drawn[i] = random.integers(len(self))
        return pixels, drawn

    def _cut(self, sample: int, cut: "_Cut", place: float) -> UInt8[np.ndarray, "t hh ww c"]:
        if self.decoded:
            return self.decoded[sample].read(cut.times(place, self.decoded[sample].duration))
        if self.notes is not None and get_worker_info() is not None:
            note_reading(self.notes, self.names[sample])
        with open_video(
            self._source(sample), backend=self.backend, name=self._name(sample)
        ) as video:
            return square(video.read(cut.times(place, video.duration)), cut.size)

    def _decode(self, sample: int, size: int, at_most: int) -> Decoded:
        """Decode a video, and stop where it takes more than `at_most` bytes."""
        with open_video(self._source(sample), name=self._name(sample)) as video:
            duration = video.duration
        starts: list[float] = []
        frames: list[UInt8[np.ndarray, "hh ww c"]] = []
        for start, frame in each_frame(self._source(sample), name=self._name(sample)):
            starts.append(start)
            frames.append(square(upright(frame)[None], size)[0])
            if len(frames) * frames[0].nbytes > at_most:
                break
        return Decoded(np.stack(frames), np.array(starts), duration)

    def _source(self, sample: int) -> Source:
        file = self.files[sample]
        return file.read() if isinstance(file, Member) else file

    def _name(self, sample: int) -> str:
        return repr(self.names[sample])

    def _note_bad(self, sample: int, error: UserError) -> None:
        """Remember a video that cannot be read; the first few are logged.

        Raises:
            UserError: there are too many.
        """
        name = self.names[sample]
        if name not in self.skipped.reasons and len(self.skipped) < NAMED:
            log.warning("%s; another takes its place", error)
        self.skipped.add(name, error)
        if all(name in self.skipped.reasons for name in self.names):
            raise UserError(f"none of the {len(self)} videos can be read: {error}") from error


@dataclass(frozen=True)
class _Cut:
    """What a clip looks like."""

    frames: int
    fps: float
    size: int

    def times(self, place: float, duration: float) -> Times:
        """Return the time of every frame in a video of `duration` seconds."""
        begin = place * max(0.0, duration - self.frames / self.fps)
        return begin + np.arange(self.frames) / self.fps


def square(frames: UInt8[np.ndarray, "t h w c"], size: int) -> UInt8[np.ndarray, "t hh ww c"]:
    """Return the middle square of frames, scaled to `size` pixels (bilinear, free of aliases).

    The whole frames are decoded and scaled here, not by FFmpeg: its scalers differ between
    versions, by 2 grey levels of 255 in the mean, and are slower.
    """
    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = frames[:, top : top + side, left : left + side]
    if side == size:
        return middle
    x = rearrange(torch.from_numpy(middle), "t h w c -> t c h w")
    x = interpolate(x, (size, size), mode="bilinear", antialias=True)
    return rearrange(x, "t c h w -> t h w c").numpy()


def hold_out(clips: Clips, *, share: float = 0.05, at_most: int = 5000) -> tuple[Clips, Clips]:
    """Split the training part once more, evenly, one video at least: the same every time."""
    count = min(at_most, max(1, int(share * len(clips))))
    chosen = np.zeros(len(clips), bool)
    chosen[np.linspace(0, len(clips) - 1, count).astype(int)] = True
    return clips.take(np.flatnonzero(~chosen)), clips.take(np.flatnonzero(chosen))


def stream_clips(shards: Shards, *, bad_share: float = BAD_SHARE) -> tuple[Clips, Clips, Clips]:
    """Return the clips of shards, to be trained on, and two lists of clips, to measure on.

    Clips of the first are looked up when they are read. The lists, 1000 at most each, with labels
    where there are any, are some of the first, and of whole shards that it does not have.

    Raises:
        UserError: there is one shard alone, or some samples have a label and some have none.
    """
    training, held_out = shards.hold_out()
    skipped = Skipped(len(shards) + len(shards.refused), "videos and shards", bad_share)
    skipped.add_all(shards.refused)
    parts = [(part, part.some(LISTED)) for part in (training, held_out)]
    streamed, other = (Clips(part.names, part, skipped=skipped) for part, _ in parts)
    labels = shared_labels(parts)
    known = _labelled({"class": labels} if labels else {})
    fit, test = streamed.take(parts[0][1]), other.take(parts[1][1])
    of_fit = {name: numbers[: len(fit)] for name, numbers in known.classes.items()}
    of_test = {name: numbers[len(fit) :] for name, numbers in known.classes.items()}
    words = known.class_names
    return (
        streamed,
        dataclasses.replace(fit, classes=of_fit, class_names=words),
        dataclasses.replace(test, classes=of_test, class_names=words),
    )


def load_clips(data: Path, *, backend: str = "pyav", bad_share: float = BAD_SHARE) -> Clips:
    """Find the videos of a folder, a tar, or a list, and their labels.

    Only their sizes are looked at, and headers until one can be read. Names in a list are relative
    to the folder of the list and stay in it, or absolute.

    Args:
        data: Folder, tar, text list or csv, as at the head of this module.
        backend: What decodes: `pyav`, `decord` or `torchcodec`.
        bad_share: Of videos that may be unreadable, beside the rule for small sets.

    Raises:
        UserError: nothing there, no video that can be read, or too many missing or empty.
    """
    if data.is_dir():
        found = _from_tree([*_folder_entries(data), *_tars_below(data)])
    elif not data.is_file():
        raise UserError(f"no videos at {str(data)!r}: give a folder, a tar, or a list of files")
    elif data.suffix.lower() == ".csv":
        found = _from_csv(data)
    elif data.suffix.lower() in (".txt", ".list", ".tsv"):
        found = _from_list(data)
    else:
        found = _from_tree(_tar_entries(data))
    entries, labels = found
    return _usable(data, entries, dataclasses.replace(labels, backend=backend), bad_share)


Entry = tuple[str, Path | Member, int]
"""Name, where the file is, and its bytes; -1 if it is missing, -2 if it must not be read."""


def _folder_entries(folder: Path) -> list[Entry]:
    found = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    files = sorted(file for file in found if not file.is_dir())
    return [(file.relative_to(folder).as_posix(), file, _size(file)) for file in files]


def _size(file: Path) -> int:
    """Return the bytes of a file, -1 where a name or a link leads nowhere."""
    return file.stat().st_size if file.is_file() else -1


def _tars_below(folder: Path) -> Iterator[Entry]:
    for tar in sorted(folder.rglob("*.tar")):
        yield from _tar_entries(tar)


def _tar_entries(path: Path) -> list[Entry]:
    """List the videos of a tar in the order of their names; links are none."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = tar_members(archive, path.stat().st_size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read as a tar of videos that is not compressed: {error}"
        ) from error
    videos = [m for m in members if PurePosixPath(m.name).suffix.lower() in SUFFIXES]
    return [
        (m.name, Member(path, m.offset_data, m.size), -2 if leaves(m.name) else m.size)
        for m in videos
    ]


def _from_tree(entries: list[Entry]) -> tuple[list[Entry], Clips]:
    """Label every file with the folder it lies in, where there are two or more."""
    kinds = [PurePosixPath("/", name).parent.name for name, _, _ in entries]
    words, labels = np.unique(kinds, return_inverse=True)
    if len(words) < 2:
        return entries, Clips((), ())
    return entries, Clips((), (), {"class": labels}, {"class": tuple(words.tolist())})


def _from_list(data: Path) -> tuple[list[Entry], Clips]:
    rows = [_path_and_label(line) for line in _text(data).splitlines() if line.strip()]
    paths, labels = [path for path, _ in rows], [label for _, label in rows]
    if any(labels) and not all(labels):
        raise UserError(f"{str(data)!r}: {paths[labels.index('')]!r} has no label, others have")
    columns = {"class": labels} if any(labels) else {}
    return _listed(data, paths), _labelled(columns)


def _path_and_label(line: str) -> tuple[str, str]:
    """Split a line behind the first word that ends as a video does, else at its last tab."""
    if found := _NAME_AND_LABEL.fullmatch(line.strip()):
        return found[1], found[2] or ""
    path, _, label = line.strip().rpartition("\t")
    return (path.strip(), label) if path else (label, "")


_NAME_AND_LABEL = re.compile(
    rf"(.+?(?:{'|'.join(map(re.escape, sorted(SUFFIXES)))}))(?:\s+(.+))?", re.IGNORECASE
)


def _from_csv(data: Path) -> tuple[list[Entry], Clips]:
    rows = _rows(data)
    header = [name.strip() for name in rows[0]] if rows else []
    if "path" not in header:
        hint = did_you_mean("path", header)
        raise UserError(f"{str(data)!r} has no column `path` in its first line{hint}")
    rows = [row for row in rows[1:] if row]
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise UserError(
                f"{str(data)!r}: row {number} has {len(row)} columns, expected {len(header)}"
            )
    columns = {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}
    return _listed(data, columns.pop("path")), _labelled(columns)


def _rows(data: Path) -> list[list[str]]:
    try:
        return list(csv.reader(_text(data).splitlines()))
    except csv.Error as error:
        raise UserError(f"{str(data)!r} cannot be read as a csv: {error}") from error


def _labelled(columns: dict[str, list[str]]) -> Clips:
    """Turn columns into labels.

    Whole numbers of a column `class` or `label` are labels as they are, so that two lists agree;
    other numbers are values, and words are classes in alphabetical order.
    """
    clips = Clips((), ())
    for name, words in columns.items():
        if name in ("class", "label") and all(_LABEL.fullmatch(word) for word in words):
            clips.classes[name] = np.array(words).astype(np.int64)
        elif (numbers := _numbers(words)) is not None:
            clips.values[name] = numbers[:, None]
        else:
            known, clips.classes[name] = np.unique(words, return_inverse=True)
            clips.class_names[name] = tuple(known.tolist())
    return clips


_LABEL = re.compile(r"[0-9]{1,9}")


def _numbers(words: list[str]) -> Float[np.ndarray, " n"] | None:
    """Return words that are numbers, none of them NaN or infinite, as such."""
    try:
        numbers = np.array([float(word) for word in words])
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as text: {error}") from error


def _listed(data: Path, paths: list[str]) -> list[Entry]:
    return [(path, data.parent / path, _listed_size(data, path)) for path in paths]


def _listed_size(data: Path, path: str) -> int:
    """Return the bytes of a file in a list: of an absolute name, or of one below the list."""
    absolute = Path(path).is_absolute()
    return -2 if not absolute and leaves(path) else _size(data.parent / path)


def _usable(data: Path, entries: list[Entry], labels: Clips, bad_share: float) -> Clips:
    """Give labels their files, without those that are missing, empty or outside their archive."""
    if not entries:
        raise UserError(f"no videos in {str(data)!r}: looked for {' '.join(sorted(SUFFIXES))}")
    names, files, sizes = zip(*entries, strict=True)
    skipped = Skipped(len(entries), f"videos of {str(data)!r}", bad_share)
    whole = dataclasses.replace(labels, names=names, files=files, skipped=skipped)
    reasons = {name: _WHY[size] for name, size in zip(names, sizes, strict=True) if size < 1}
    kept = [sample for sample, size in enumerate(sizes) if size > 0]
    most = most_bad(len(entries), bad_share)
    while kept and len(reasons) <= most and (complaint := whole.complaint(kept[0])):
        reasons[names[kept.pop(0)]] = complaint
    skipped.add_all(reasons)
    return whole.take(np.array(kept))


_WHY = {
    0: "it is empty",
    -1: "it does not exist",
    -2: "its name leads out of the folder of the list, or the archive",
}
