"""Video files: write H.264, read frames by time.

Reading takes decord where it is installed and opens the file, and PyAV elsewhere (decord has no
wheel for some platforms, and no AV1). Readers are opened where they are used and closed at once:
one that crosses a process or thread crashes in either library.
"""

from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import Float, UInt8

from jepa_world.registry import UserError

decord: Any
try:
    import decord
except ImportError:
    decord = None


def write_video(path: str | Path, frames: UInt8[np.ndarray, "t h w c"], fps: float) -> None:
    """Write RGB frames as H.264 (yuv420p, which every browser plays).

    A height or width that is odd is padded by repeating the last row or column. The file is written
    beside its name and renamed when whole.

    Raises:
        UserError: no frames, or the folder cannot be written.

    Example:
        >>> write_video("/tmp/grey.mp4", np.full((4, 32, 32, 3), 128, np.uint8), fps=10)
        >>> read_video("/tmp/grey.mp4").shape
        (4, 32, 32, 3)
    """
    path = Path(path)
    if len(frames) == 0:
        raise UserError(f"no frames to write to {path}")
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _encode(partial, frames, fps)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"video {path} cannot be written: {error}") from error


def read_video(
    path: str | Path, times: Float[np.ndarray, " t"] | None = None
) -> UInt8[np.ndarray, "t h w c"]:
    """Return all RGB frames, or those on screen at `times` (seconds from the first frame).

    Raises:
        UserError: the file is missing, is no video, or is damaged.
    """
    if not Path(path).is_file():
        raise UserError(f"video {path} does not exist")
    frames = _read_with_decord(path, times) if decord else None
    return _read_with_pyav(path, times) if frames is None else frames


def video_times(path: str | Path) -> Float[np.ndarray, " t"]:
    """Return the time of every frame in seconds from the first one; nothing is decoded.

    Raises:
        UserError: the file is missing, is no video, or is damaged.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stamps = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            seconds = np.sort(np.array(stamps, np.float64)) * float(stream.time_base or 1)
    except (FFmpegError, OSError, IndexError) as error:
        raise UserError(f"video {path} cannot be read: {error}") from error
    if len(seconds) == 0:
        raise UserError(f"video {path} has no frames")
    return seconds - seconds[0]


def _encode(path: Path, frames: np.ndarray, fps: float) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"crf": "18"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _read_with_decord(path: str | Path, times: np.ndarray | None) -> np.ndarray | None:
    """Return the frames, or None where decord cannot open or decode the file."""
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        starts = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0]
        return reader.get_batch(_frames_at(starts, times)).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError):
        return None


def _read_with_pyav(path: str | Path, times: np.ndarray | None) -> np.ndarray:
    wanted = _frames_at(video_times(path), times)
    kept: dict[int, np.ndarray] = {}
    try:
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if frame.is_corrupt:
                    raise UserError(f"video {path} is damaged at frame {index}")
                if index in wanted:
                    kept[index] = frame.to_ndarray(format="rgb24")
                if index == max(wanted):
                    break
    except (FFmpegError, OSError) as error:
        raise UserError(f"video {path} cannot be read: {error}") from error
    if missing := set(wanted) - set(kept):
        raise UserError(f"video {path} is cut short: frame {min(missing)} does not decode")
    return np.stack([kept[index] for index in wanted])


def _frames_at(starts: np.ndarray, times: np.ndarray | None) -> list[int]:
    """Return the numbers of the frames on screen at `times`; a millisecond forgives rounding."""
    if times is None:
        return list(range(len(starts)))
    shown = np.searchsorted(starts - starts[0], np.asarray(times) + 1e-3, side="right") - 1
    return shown.clip(0).tolist()
