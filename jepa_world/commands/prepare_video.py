"""Encode a folder of videos anew, so that clips of them are read fast.

Reading a clip decodes from the key frame before it: with one every 12 frames instead of 250, and
small pictures, that is several times less work. Sub-folders, and with them labels, are kept. A
source is only read; a result is written beside its name and renamed when whole, so an interrupted
run continues where it stopped.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import av
from tqdm import tqdm

from jepa_world.config import read_yaml, require_at_least, to_dict
from jepa_world.data.reencoding import Job, Outcome, attempt
from jepa_world.data.video import SUFFIXES
from jepa_world.processes import ProcessDied, map_in_processes
from jepa_world.registry import UserError
from jepa_world.runs import Run

_NOT_SETTINGS = {"workers"}  # what changes nothing about the result


@dataclass(frozen=True)
class PrepareVideo:
    """Encode a folder of videos anew: a short side of 256 pixels, a key frame every 12 frames."""

    data: Path
    """Folder of videos, with sub-folders or without; nothing in it is changed."""
    short_side: int = 256
    """Short side of the pictures in pixels; smaller ones stay as they are."""
    gop: int = 12
    """Frames from a key frame to the next one: fewer are read faster and take more room."""
    crf: float = 20.0
    """Quality of H.264, from 0 (nothing lost) to 51."""
    workers: int = 0
    """Processes; 0 is one for every core."""
    run_dir: Path | None = None
    """Folder of the result; default <data>_<short side>p. The same one again continues."""


def run(config: PrepareVideo) -> None:
    """Encode what is not encoded yet; name what cannot be read in results.json."""
    require_at_least(config, short_side=16, gop=1, crf=0, workers=0)
    default = config.data.with_name(f"{config.data.resolve().name}_{config.short_side}p")
    made = Run.of("prepare_video", config.run_dir or default)
    _check_folders(config, made.folder)
    jobs = _jobs(config, made.folder)
    made.open(config, resume=(made.folder / "config.yaml").is_file())
    todo = [job for job in jobs if not _is_done(job)]
    outcomes = dict(zip(todo, _encode_all(config, todo, len(jobs)), strict=True))
    complaints = {
        job.source.relative_to(config.data).as_posix(): outcome.complaint
        for job, outcome in outcomes.items()
        if outcome.complaint
    }
    if complaints:
        print(f"{len(complaints)} of {len(jobs)} videos cannot be read: results.json names them")
    made.finish(_results(jobs, list(outcomes.values()), complaints))
    if len(complaints) == len(jobs):
        first = next(iter(complaints.values()))
        raise UserError(f"none of the {len(jobs)} videos can be read; the first: {first}")


def _check_folders(config: PrepareVideo, target: Path) -> None:
    """Refuse to write among the sources, or into a result of other settings."""
    if not config.data.is_dir():
        raise UserError(f"no folder {str(config.data)!r}: --data is a folder of videos")
    inside, outside = target.resolve(), config.data.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise UserError(
            f"{str(target)!r} and the sources in {str(config.data)!r} lie in each other: "
            "name another --run-dir"
        )
    if (target / "config.yaml").is_file():
        before, now = read_yaml(target / "config.yaml"), to_dict(config)
        for name in now.keys() - _NOT_SETTINGS:
            if before.get(name) != now[name]:
                raise UserError(
                    f"{str(target)!r} was made with {name} {before.get(name)!r}, not "
                    f"{now[name]!r}: name another --run-dir"
                )


def _jobs(config: PrepareVideo, folder: Path) -> list[Job]:
    """Name the copy of every video: the same path with .mp4, added where two would be one."""
    sources = sorted(
        path
        for path in config.data.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not sources:
        raise UserError(
            f"no videos in {str(config.data)!r}: looked for {' '.join(sorted(SUFFIXES))}"
        )
    plain = [folder / path.relative_to(config.data).with_suffix(".mp4") for path in sources]
    times = Counter(plain)
    return [
        Job(
            source,
            target if times[target] == 1 else target.with_name(f"{source.name}.mp4"),
            config.short_side,
            config.gop,
            config.crf,
        )
        for source, target in zip(sources, plain, strict=True)
    ]


def _is_done(job: Job) -> bool:
    target = job.target
    return target.is_file() and target.stat().st_mtime >= job.source.stat().st_mtime


def _encode_all(config: PrepareVideo, todo: list[Job], total: int) -> list[Outcome]:
    progress = tqdm(desc="encoding", total=total, initial=total - len(todo), unit="video")
    outcomes: list[Outcome] = []
    try:
        with progress:
            for outcome in map_in_processes(attempt, todo, workers=config.workers):
                outcomes.append(outcome)
                progress.update()
    except OSError as error:
        raise UserError(f"a video cannot be written: {error}; run again to continue") from error
    except ProcessDied as error:
        names = ", ".join(str(job.source) for job in error.items)
        raise UserError(
            f"a process died while it encoded one of {names} (a file that crashes the decoder, or "
            "out of memory?): take it out, or run again with --workers 1, to continue"
        ) from error
    return outcomes


def _results(
    jobs: list[Job], outcomes: list[Outcome], complaints: dict[str, str]
) -> dict[str, object]:
    there = [job for job in jobs if job.target.is_file()]
    return {
        "videos": len(jobs),
        "encoded_now": sum(not outcome.complaint for outcome in outcomes),
        "frames_now": sum(outcome.frames for outcome in outcomes),
        "unreadable": complaints,
        "bytes_before": sum(job.source.stat().st_size for job in there),
        "bytes_after": sum(job.target.stat().st_size for job in there),
        "av": av.__version__,
    }
