"""Videos encoded anew so that clips are read fast: small pictures, key frames close together."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from jepa_world.data.video import each_frame, upright
from jepa_world.registry import UserError

TICK = Fraction(1, 90_000)  # seconds: holds every usual frame rate


@dataclass(frozen=True)
class Job:
    """A video, where its copy goes, and how it is encoded."""

    source: Path
    target: Path
    short_side: int
    gop: int
    crf: float


@dataclass(frozen=True)
class Outcome:
    """What became of a job: frames written, or why there are none."""

    frames: int
    complaint: str = ""


def attempt(job: Job) -> Outcome:
    """Do a job; a video that cannot be read whole is a complaint and leaves nothing."""
    try:
        return Outcome(shrink_video(job))
    except UserError as error:
        return Outcome(0, str(error))


def shrink_video(job: Job) -> int:
    """Write the pictures of a video as H.264 in mp4, and return how many they are.

    The short side is `short_side` pixels or what it was, whichever is less, both sides are made
    even; every `gop` frames at most is a key frame. Times are kept, turns noted in the file are
    made, sound is left out. The file is written beside its name and renamed when whole.

    Raises:
        UserError: the source is missing, is no video, or is damaged.
        OSError: the target cannot be written.
    """
    partial = job.target.with_name(job.target.name + ".unfinished")
    job.target.parent.mkdir(parents=True, exist_ok=True)
    try:
        count = _encode(job, partial)
        partial.replace(job.target)
    except FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise UserError(f"video {job.source} cannot be encoded: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def _encode(job: Job, partial: Path) -> int:
    frames = _small_frames(job)
    first = next(frames, None)
    if first is None:
        raise UserError(f"video {job.source} has no frames")
    with av.open(str(partial), "w", format="mp4") as container:
        options = {"crf": str(job.crf), "threads": "1"}
        stream: Any = container.add_stream("libx264", rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = first.height, first.width, "yuv420p"
        stream.codec_context.gop_size = job.gop
        stream.codec_context.time_base = TICK
        stream.codec_context.colorspace = first.colorspace
        stream.codec_context.color_range = first.color_range
        for frame in chain((first,), frames):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        return stream.frames


def _small_frames(job: Job) -> Iterator[av.VideoFrame]:
    """Yield frames in their small size, their time in ticks."""
    for time, frame in each_frame(job.source):
        if frame.rotation:
            frame = av.VideoFrame.from_ndarray(upright(frame).copy(), format="rgb24")
        scale = min(1.0, job.short_side / min(frame.height, frame.width))
        height, width = (
            2 * max(1, round(scale * side / 2)) for side in (frame.height, frame.width)
        )
        small = frame.reformat(width, height, "yuv420p", interpolation="AREA", threads=1)
        small.pts, small.time_base = round(time / TICK), TICK
        small.pict_type = 0  # the encoder chooses
        yield small
