"""Pictures and videos in many tars, or in folders too large to list: looked up shard by shard.

    shards/train-{000000..000099}.tar   tars by number
    shards/train-*.tar                  tars by a pattern, or a folder of nothing but tars
    shards.txt                          tars, one a line, below the folder of the list
    photos/**                           a folder, and every folder below it, as it is on the disk

In a tar lie samples as webdataset writes them (github.com/webdataset/webdataset): `key.jpg` or
`key.mp4`, and beside it `key.cls` or `key.json` where there are labels; a key ends at the first dot
of the name. Neither an index nor a copy is made: the samples of every shard are counted once, and
the places of those in a shard are found when it is read. What is kept is a number a shard, and the
tables of the few shards that are open.
"""

import json
import os
import re
import tarfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import glob
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar, overload

import numpy as np
from jaxtyping import Int

from jepa_world.data.files import BAD_SHARE, Member, Skipped, leaves, tar_members
from jepa_world.registry import UserError

T = TypeVar("T")
MOST_SHARDS = 10**7  # that a pattern may name
LISTED = 1000  # samples of the parts that are measured on
LARGEST_LABEL = 2**20  # bytes of a file that may be a label


class Count(NamedTuple):
    """What a shard holds: samples, members that must not be used and why, or why it is none."""

    samples: int
    refused: dict[str, str]
    wrong: str = ""


def is_sharded(data: Path) -> bool:
    """Say whether a name means shards: a pattern, a list of tars, or a folder of nothing else."""
    if data.exists() and data.is_file():
        return data.suffix.lower() in (".txt", ".list") and _first_word(data).endswith(".tar")
    if data.is_dir():
        return _holds_only_tars(data)
    return bool(_NUMBERS.search(str(data)) or "*" in str(data))


def find_shards(data: Path) -> tuple[Path, ...]:
    """Return the tars or folders that a name stands for, in the order of their names.

    Raises:
        UserError: none there, or a list names one outside its folder.
    """
    if data.is_file():
        found = _listed_tars(data)
    elif data.is_dir():
        found = (data / name for name in sorted(os.listdir(data)) if name.endswith(".tar"))
    elif data.name == "**":
        found = sorted(_folders(data.parent))
    elif _NUMBERS.search(str(data)):
        found = map(Path, _numbered(str(data)))
    else:
        found = (Path(name) for name in sorted(glob(str(data))) if name.endswith(".tar"))
    shards = tuple(found)
    if not shards:
        raise UserError(f"{str(data)!r} stands for no tar and no folder")
    return shards


def count_samples(shard: Path, suffixes: frozenset[str]) -> Count:
    """Count the samples of a shard, keeping no name: headers of a tar, entries of a folder.

    Args:
        shard: A tar, or a folder whose own files are meant.
        suffixes: Of the files that are samples, with their dots, in small letters.
    """
    try:
        if shard.is_dir():
            return Count(sum(1 for _ in _folder_files(shard, suffixes)), {})
        table = _tar_table(shard, suffixes)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        return Count(0, {}, f"it cannot be read: {error or type(error).__name__}")
    return Count(len(table), table.refused, "" if len(table) else "it holds no samples")


@dataclass(frozen=True)
class Table:
    """The samples of one shard in the order of their names."""

    names: tuple[str, ...]
    places: Int[np.ndarray, "n 4"]
    """First byte and number of bytes of each, and of its label; nothing for a folder."""
    refused: dict[str, str] = field(default_factory=lambda: {})

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Shards(Sequence[Path | Member]):
    """The files of all samples, by number: those of one shard have numbers that follow each other.

    Example:
        >>> for name in "ab":
        ...     _ = Path(f"/tmp/photos/{name}").mkdir(parents=True, exist_ok=True)
        ...     _ = Path(f"/tmp/photos/{name}/0.jpg").write_bytes(b"")
        >>> pictures = frozenset({".jpg"})
        >>> paths = find_shards(Path("/tmp/photos/**"))
        >>> shards = Shards.of(paths, [count_samples(path, pictures) for path in paths], pictures)
        >>> len(shards), shards.sizes, shards.names[1], shards.label(1)
        (2, array([1, 1]), 'b/0.jpg', 'b')
    """

    paths: tuple[Path, ...]
    sizes: Int[np.ndarray, " shards"]
    """Samples of each."""
    suffixes: frozenset[str]
    refused: dict[str, str] = field(default_factory=lambda: {})
    """Shards, and members of them, that are left out, and why."""
    most_open: int = 64
    """Tables that are kept: at least as many as shards that are read in turns."""
    opened: OrderedDict[int, Table] = field(default_factory=OrderedDict, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        paths: Sequence[Path],
        counts: Sequence[Count],
        suffixes: frozenset[str],
        *,
        bad_share: float = BAD_SHARE,
    ) -> "Shards":
        """Put shards together that were counted.

        Raises:
            UserError: too many of them cannot be read (`files.most_bad`), or nothing is left.
        """
        skipped = Skipped(len(paths), "shards", bad_share)
        skipped.add_all({str(p): c.wrong for p, c in zip(paths, counts, strict=True) if c.wrong})
        members = {
            f"{path.name}/{name}": why
            for path, count in zip(paths, counts, strict=True)
            for name, why in count.refused.items()
        }
        pairs = zip(paths, counts, strict=True)
        kept = [(path, count.samples) for path, count in pairs if count.samples]
        if not kept:
            looked = " ".join(sorted(suffixes))
            raise UserError(f"no samples in {len(paths)} shards: looked for {looked}")
        sizes = np.array([size for _, size in kept], np.int64)
        return cls(tuple(p for p, _ in kept), sizes, suffixes, skipped.reasons | members)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Path | Member: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Path | Member]: ...

    def __getitem__(self, index: int | slice) -> Path | Member | Sequence[Path | Member]:
        """Return where a sample is."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        path, table, row = self._find(index)
        if path.is_dir():
            return path / table.names[row]
        first, size = table.places[row, :2].tolist()
        return Member(path, first, size)

    @property
    def names(self) -> Sequence[str]:
        """What each sample is called: shard/member."""
        return _Lazy(len(self), self._name)

    def take(self, shards: Int[np.ndarray, " k"]) -> "Shards":
        """Return some of the shards."""
        paths = tuple(self.paths[i] for i in shards)
        return replace(self, paths=paths, sizes=self.sizes[shards], opened=OrderedDict())

    def hold_out(self, *, share: float = 0.05, at_most: int = LISTED) -> tuple["Shards", "Shards"]:
        """Split whole shards off, evenly: a share of them, but no more than `at_most` samples need.

        Raises:
            UserError: there is one shard alone.
        """
        if len(self.sizes) < 2:
            raise UserError(f"{str(self.paths[0])!r} is the only shard: give two, one is held out")
        typical = max(1, int(np.median(self.sizes)))
        count = max(1, min(int(share * len(self.paths)), -(-at_most // typical)))
        chosen = np.zeros(len(self.paths), bool)
        chosen[np.linspace(0, len(self.paths) - 1, count + 1).astype(int)[1:]] = True
        return self.take(np.flatnonzero(~chosen)), self.take(np.flatnonzero(chosen))

    def some(self, at_most: int) -> Int[np.ndarray, " k"]:
        """Return samples evenly chosen in 16 shards, or fewer: so many tables are read."""
        shards = np.linspace(0, len(self.paths) - 1, min(16, len(self.paths))).astype(int)
        each = -(-at_most // len(shards))
        index = [
            self._ends[shard] - 1 - np.linspace(0, size - 1, min(each, size)).astype(int)
            for shard, size in zip(shards.tolist(), self.sizes[shards].tolist(), strict=True)
        ]
        return np.sort(np.concatenate(index))

    def label(self, sample: int) -> str:
        """Return what `key.cls` or `class` or `label` in `key.json` says, else the folder's name.

        Raises:
            UserError: the label cannot be read.
        """
        path, table, row = self._find(sample)
        if path.is_dir():
            return path.name
        first, size = table.places[row, 2:].tolist()
        folder = PurePosixPath(table.names[row]).parent.name
        try:
            return _label(Member(path, first, min(size, LARGEST_LABEL)).read()) or folder
        except (OSError, ValueError) as error:
            raise UserError(f"the label of {self._name(sample)!r} is damaged: {error}") from error

    @cached_property
    def _ends(self) -> Int[np.ndarray, " shards"]:
        return np.cumsum(self.sizes)

    def _name(self, sample: int) -> str:
        path, table, row = self._find(sample)
        return f"{path.name}/{table.names[row]}"

    def _find(self, sample: int) -> tuple[Path, Table, int]:
        """Return the shard of a sample, its table, and the row in it."""
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        row = sample - int(self._ends[shard] - self.sizes[shard])
        return self.paths[shard], self._table(shard), row

    def _table(self, shard: int) -> Table:
        """Return the table of a shard, read anew unless it is among those that are open."""
        if shard not in self.opened:
            self.opened[shard] = self._read_table(self.paths[shard], int(self.sizes[shard]))
            while len(self.opened) > self.most_open:
                self.opened.popitem(last=False)
        self.opened.move_to_end(shard)
        return self.opened[shard]

    def _read_table(self, path: Path, counted: int) -> Table:
        try:
            read = _folder_table if path.is_dir() else _tar_table
            table = read(path, self.suffixes)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise UserError(f"shard {str(path)!r} cannot be read: {error}") from error
        if len(table) != counted:
            raise UserError(
                f"shard {str(path)!r} has {len(table)} samples, {counted} when it was counted: "
                "start anew"
            )
        return table


def shared_labels(parts: Sequence[tuple[Shards, Int[np.ndarray, " k"]]]) -> list[str]:
    """Return the labels of samples of several parts, one after another; nothing without two words.

    Raises:
        UserError: some have a label and some have none, or one cannot be read.
    """
    labels = [shards.label(sample) for shards, index in parts for sample in index.tolist()]
    if any(labels) and not all(labels):
        raise UserError(f"{labels.count('')} of {len(labels)} samples have no label, others have")
    return labels if len(set(labels)) > 1 else []


class _Lazy(Sequence[T]):
    """Values that are looked up when they are asked for."""

    def __init__(self, count: int, get: Callable[[int], T]) -> None:
        self._count, self._get = count, get

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self._get(i) for i in range(*index.indices(self._count))]
        return self._get(int(index))


# Names


_NUMBERS = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")


def _numbered(pattern: str) -> Iterator[str]:
    """Yield a pattern with every number of its first braces, and of those behind them."""
    found = _NUMBERS.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + MOST_SHARDS:
        raise UserError(f"{pattern!r}: give rising numbers, {MOST_SHARDS} at most")
    for number in range(first, last + 1):
        name = str(number).zfill(len(found[1]))
        yield from _numbered(pattern[: found.start()] + name + pattern[found.end() :])


def _folders(folder: Path) -> Iterator[Path]:
    """Yield a folder and all below it; links are not followed."""
    yield folder
    try:
        with os.scandir(folder) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise UserError(f"the folder {str(folder)!r} cannot be read: {error.strerror}") from error
    for path in below:
        yield from _folders(Path(path))


def _folder_files(folder: Path, suffixes: frozenset[str]) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith("."):
                if entry.is_file():
                    yield name


def _holds_only_tars(folder: Path) -> bool:
    """Say whether a folder holds tars, two at least, and beside them nothing but notes on them."""
    tars = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix not in (".tar", ".json", ".txt", ".idx", ".parquet"):
                return False
            tars += suffix == ".tar"
    return tars > 1


def _first_word(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return next((line.strip() for line in file if line.strip()), "")


def _listed_tars(data: Path) -> Iterator[Path]:
    with data.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            name = line.strip()
            if name and not Path(name).is_absolute() and leaves(name):
                raise UserError(f"{str(data)!r} names {name!r}, outside its folder")
            if name:
                yield data.parent / name


# Tables


def _folder_table(folder: Path, suffixes: frozenset[str]) -> Table:
    return Table(tuple(sorted(_folder_files(folder, suffixes))), np.zeros((0, 4), np.int64))


def _tar_table(path: Path, suffixes: frozenset[str]) -> Table:
    """List the samples of a tar.

    Raises:
        tarfile.TarError, OSError, EOFError, ValueError: it is no tar, compressed, or cut short.
    """
    size = path.stat().st_size
    with tarfile.open(path, "r:") as archive:
        members = tar_members(archive, size)
        _require_end(path, archive.offset)
    refused = {m.name: "its name leads out of the archive" for m in members if leaves(m.name)}
    samples: defaultdict[str, list[tarfile.TarInfo]] = defaultdict(list)
    labels: dict[str, tarfile.TarInfo] = {}
    for member in members:
        key, extension = _key(member.name)
        if not key or member.name in refused:
            continue
        if "." + extension.rpartition(".")[2].lower() in suffixes:
            samples[key].append(member)
        elif extension in (".cls", ".json"):  # .cls comes first
            labels.setdefault(key, member)
    names: list[str] = []
    places: list[tuple[int, int, int, int]] = []
    for key, found in samples.items():
        sample = _one_of(found, refused)
        label = labels.get(key)
        names.append(sample.name)
        at, count = (label.offset_data, label.size) if label else (0, 0)
        places.append((sample.offset_data, sample.size, at, count))
    return Table(tuple(names), np.array(places, np.int64).reshape(-1, 4), refused)


def _require_end(path: Path, offset: int) -> None:
    """Check that a tar ends where its members do: one cut between two of them looks whole.

    Raises:
        ValueError: it does not.
    """
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"it is cut short or damaged after {offset} bytes")


def _key(name: str) -> tuple[str, str]:
    """Split a name at the first dot behind its folders; hidden files have no key.

    Example:
        >>> _key("a.b/000.seg.png"), _key("a/.hidden.png")
        (('a.b/000', '.seg.png'), ('', ''))
    """
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return (folder + slash + key, "." + extension) if key else ("", "")


def _one_of(found: list[tarfile.TarInfo], refused: dict[str, str]) -> tarfile.TarInfo:
    """Return the file of a key that is its sample: that with a plain suffix, `jpg`, not `seg.png`.

    Others of its kind are parts of the same sample, unless none or several are plain: then the key
    is no key, and they are refused.
    """
    plain = [member for member in found if _key(member.name)[1].count(".") == 1]
    sample = (plain or found)[0]
    if len(found) > 1 and len(plain) != 1:
        for member in found:
            if member is not sample:
                refused[member.name] = f"it has the key of {sample.name!r}: keys end at a dot"
    return sample


def _label(content: bytes) -> str:
    """Return the label that a `.cls` or a `.json` holds; none in a `.json` without one.

    Raises:
        ValueError: neither a word nor a mapping.
    """
    text = content.decode("utf-8").strip()  # empty where there is no file
    if not text.startswith("{"):
        return text
    values = json.loads(text)
    return next((str(values[name]) for name in ("class", "label") if name in values), "")
