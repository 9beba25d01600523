"""Files of a data set: those that cannot be read are counted and named, and names stay inside.

A set of a million files always holds some that cannot be read. They are skipped, until they are
more than a share of all; in small sets a tenth may be, and ten.
"""

import json
import math
import multiprocessing
import os
import re
import signal
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from jepa_world.registry import UserError

BAD_SHARE = 0.01  # of the files of a set that may be unreadable
NAMED = 5  # files that the terminal and results.json name; `skipped.jsonl` has all


def most_bad(count: int, share: float = BAD_SHARE) -> int:
    """Return how many of `count` files may be unreadable: none with a share of 0.

    Example:
        >>> [most_bad(count) for count in (9, 50, 100, 1000, 10**6)]
        [0, 5, 10, 10, 10000]
    """
    return max(int(share * count), min(10, count // 10)) if share else 0


@dataclass
class Skipped:
    """What of a data set was left out, and why.

    Example:
        >>> skipped = Skipped(200, "videos")
        >>> skipped.add("a.mp4", "it is empty")
        >>> skipped.summary()
        '1 of 200 videos skipped: a.mp4 (it is empty)'
    """

    total: int
    what: str = "files"
    share: float = BAD_SHARE
    """Of the total that may be left out, beside the rule for small sets."""
    reasons: dict[str, str] = field(default_factory=lambda: {})
    """By name."""
    record: Path | None = None
    """A file in which processes that read the same set tell each other, and the user."""
    recalled: int = 0
    """Bytes of it that are known here."""

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: object) -> None:
        """Leave out one more.

        Raises:
            UserError: there are too many.
        """
        if name in self.reasons:
            return
        self.reasons[name] = " ".join(str(reason).split())
        if self.record is not None:
            line = json.dumps({"name": name, "reason": self.reasons[name]}) + "\n"
            with self.record.open("a", encoding="utf-8") as file:
                file.write(line)
        self.recall()
        self.check()

    def add_all(self, reasons: dict[str, str]) -> None:
        """Leave out several at once.

        Raises:
            UserError: there are too many.
        """
        self.reasons |= reasons
        self.check()

    def check(self) -> None:
        """Check that they are not too many.

        Raises:
            UserError: they are.
        """
        if len(self) and len(self) > most_bad(self.total, self.share):
            raise UserError(
                f"{len(self)} of {self.total} {self.what} cannot be used, more than "
                f"{self.share:.2%}: {self._named(3)}"
            )

    def recall(self) -> None:
        """Learn what other processes left out."""
        if self.record is None or not self.record.is_file():
            return
        with self.record.open("rb") as file:
            file.seek(self.recalled)
            told = file.read()
        whole = told[: told.rfind(b"\n") + 1]  # another process may be in the middle of a line
        self.recalled += len(whole)
        for line in whole.decode("utf-8").splitlines():
            if line.endswith("}"):
                known = json.loads(line)
                self.reasons.setdefault(known["name"], known["reason"])

    def summary(self) -> str:
        """Say in a line how many were left out, and name the first of them."""
        return f"{len(self)} of {self.total} {self.what} skipped: {self._named(NAMED)}"

    def results(self) -> dict[str, Any]:
        """Return what results.json holds: how many, of how many, and the first of them."""
        first = dict(list(self.reasons.items())[:NAMED])
        return {"skipped": {"count": len(self), "of": self.total, "first": first}}

    def _named(self, count: int) -> str:
        return ", ".join(f"{n} ({why})" for n, why in list(self.reasons.items())[:count])


@dataclass(frozen=True)
class Member:
    """A file inside a tar that is not compressed: its bytes lie there in one piece."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the content."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def leaves(name: str) -> bool:
    """Say whether a name leads out of the folder or the archive that it is relative to."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return ".." in parts or "\0" in name or name.startswith(("/", "\\")) or parts[:1] == ("/",)


def inside(folder: Path, template: str, **numbers: int | str) -> Path:
    """Fill in a template of a path, such as `data/chunk-{chunk_index:03d}.parquet`.

    Only names and widths of two digits are understood: more of Python's formats could take all
    memory.

    Raises:
        ValueError: another template, or a path that leads out of the folder.
    """

    def fill(found: re.Match[str]) -> str:
        value = numbers[found[1]]
        return str(value).zfill(int(found[2] or 0))

    name = re.sub(r"\{(\w+)(?::0?(\d{1,2})d?)?\}", fill, template)
    if leaves(name) or "{" in name:
        raise ValueError(f"the path {template!r} is no template, or leads out of the folder")
    return folder / name


def tar_members(archive: tarfile.TarFile, size: int) -> list[tarfile.TarInfo]:
    """List the plain files of a tar in the order of their names; links and devices are none.

    Raises:
        tarfile.ReadError: a member that begins before the one in front of it, or ends behind the
            archive of `size` bytes.
    """
    found: list[tarfile.TarInfo] = []
    reached = -1
    for member in archive:
        if member.offset <= reached or member.size < 0:
            raise tarfile.ReadError(f"{member.name!r} lies before what precedes it")
        reached = member.offset
        if size and member.offset_data + member.size > size:
            raise tarfile.ReadError(f"{member.name!r} is cut short")
        if member.isreg() and not member.issparse():
            found.append(member)
    return sorted(found, key=lambda member: member.name)


def require_room(what: str, sizes: Sequence[int], itemsize: int) -> None:
    """Refuse an array that takes more than the memory of this machine.

    Raises:
        UserError: it does.
    """
    needed = math.prod(int(size) for size in sizes) * itemsize
    if needed > memory():
        raise UserError(f"{what} takes {needed / 2**30:.1f} GiB, more than this machine has")


def memory() -> float:
    """Return the bytes of memory of this machine, as far as the system tells."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return math.inf
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def note_reading(folder: Path, name: str) -> None:
    """Write down what this process begins to read: it may die of it."""
    (folder / f"reading-{os.getpid()}").write_text(name, encoding="utf-8")


@contextmanager
def naming_lost_readers(folder: Path) -> Iterator[None]:
    """Say which file a reader of a loader died of or hangs at, and forget the notes in the end.

    Readers that are left are killed: one that hangs would keep this process from ending.

    Raises:
        UserError: a reader was lost; torch says so wherever the process happens to be.
    """
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if "DataLoader" not in said:
            raise
        read = _being_read(folder, said)
        _kill_readers()
        raise UserError(
            f"a process that reads data was lost ({said}); it was reading {read}: take that file "
            "out, or try fewer workers"
        ) from error
    finally:
        for note in folder.glob("reading-*"):
            note.unlink(missing_ok=True)


def _kill_readers() -> None:
    """Kill the daemons of this process; torch's handler would raise once more for each of them."""
    in_main = threading.current_thread() is threading.main_thread()
    signals = [signal.SIGCHLD] if in_main and hasattr(signal, "SIGCHLD") else []
    before = [signal.signal(one, signal.SIG_DFL) for one in signals]
    for reader in multiprocessing.active_children():
        if reader.daemon:
            reader.kill()
            reader.join()
    for one, handler in zip(signals, before, strict=True):
        signal.signal(one, handler)


def _being_read(folder: Path, said: str) -> str:
    """Return what the processes named in an error were reading, else what has taken longest."""
    notes = sorted(folder.glob("reading-*"), key=lambda note: note.stat().st_mtime_ns)
    dead = {f"reading-{number}" for number in re.findall(r"\d+", said)}
    chosen = [note for note in notes if note.name in dead] or notes[:1]
    return ", ".join(repr(note.read_text(encoding="utf-8")) for note in chosen) or "nothing yet"
