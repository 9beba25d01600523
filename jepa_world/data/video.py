"""Video files: write H.264, read frames by time.

A frame is addressed by the time it is on screen, in seconds from the first one, never by its
number: variable frame rates, edit lists and frames that a container hides change numbers, not
times. `open_video` gives the same frames through three libraries:

    pyav        the default: any codec, sees damage, decodes from the key frame before the first
                time what is needed for the others
    decord      where it reads the file rightly, PyAV elsewhere (no AV1, HEVC, edit lists)
    torchcodec  where it is installed

All decode on one thread: loaders run one process a core, and with several threads FFmpeg drops the
mark of a damaged frame. A reader is opened where it is used and closed at once: one that crosses a
process or a thread crashes in any of the three. Rotation noted in a file is applied.
"""

import io
import math
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from jaxtyping import Float, UInt8

from jepa_world.registry import UserError, did_you_mean

SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
Source = str | Path | bytes
"""A file by its name, or its content."""
Frames = UInt8[np.ndarray, "t hh ww c"]
Times = Float[np.ndarray, " t"]


class Video(Protocol):
    """An open video: its duration and its frames by time."""

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last, as the header has it."""
        ...

    def read(self, times: Times) -> Frames:
        """Return the RGB frames on screen at `times`; after the end, the last one."""
        ...


def open_video(
    source: Source, *, backend: str = "pyav", name: str = ""
) -> AbstractContextManager[Video]:
    """Open a video, for a `with` block.

    Args:
        source: The file, or its content.
        backend: `pyav`, `decord` or `torchcodec`.
        name: What errors call the video; the file's name if left out.

    Raises:
        UserError: unknown or missing backend, missing file, no video, damage; `read` raises it too.

    Example:
        >>> write_video("/tmp/ten.mp4", np.full((10, 32, 32, 3), 99, np.uint8), fps=10)
        >>> with open_video("/tmp/ten.mp4") as video:
        ...     video.duration, video.read(np.array([0.0, 0.55, 99.0])).shape
        (1.0, (3, 32, 32, 3))
    """
    name = name or _name(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise UserError(f"video {name} does not exist")
    if backend not in _BACKENDS:
        raise UserError(f"unknown backend {backend!r}{did_you_mean(backend, list(_BACKENDS))}")
    return _BACKENDS[backend](source, name)


def read_video(source: Source, times: Times | None = None, *, backend: str = "pyav") -> Frames:
    """Return all RGB frames, or those on screen at `times` (seconds from the first frame).

    Raises:
        UserError: the file is missing, is no video, or is damaged.
    """
    with open_video(source, backend=backend) as video:
        return video.read(video_times(source) if times is None else times)


def video_times(source: Source) -> Times:
    """Return the time of every frame in seconds from the first one; nothing is decoded.

    Raises:
        UserError: the file is missing, is no video, or is damaged.
    """
    with _PyAVVideo(source, _name(source)) as video:
        return video.times()


def each_frame(source: Source, *, name: str = "") -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield the time of every frame in seconds from the first, and the frame: `upright` is its RGB.

    Raises:
        UserError: the file is missing, is no video, or is damaged.
    """
    with _PyAVVideo(source, name or _name(source)) as video:
        yield from video.each_frame()


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


def upright(frame: av.VideoFrame) -> UInt8[np.ndarray, "hh ww c"]:
    """Return a decoded frame as RGB, turned by the quarter turns its file notes."""
    pixels = frame.to_ndarray(format="rgb24", threads=1)  # starting more costs more than it saves
    turns = round(frame.rotation / 90) % 4
    return np.rot90(pixels, turns) if turns else pixels


def _name(source: Source) -> str:
    return f"of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _encode(path: Path, frames: np.ndarray, fps: float) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"crf": "18"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # threads cost small videos a third more
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


class _PyAVVideo:
    def __init__(self, source: Source, name: str) -> None:
        self._source, self._name = source, name
        self._open()
        self._tick = float(self._stream.time_base or 1)
        self._first = self._stream.start_time or 0

    def __enter__(self) -> "_PyAVVideo":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    @property
    def codec(self) -> str:
        return self._stream.codec_context.name

    @property
    def container(self) -> str:
        return self._container.format.name.partition(",")[0]

    def _open(self) -> None:
        source = self._source
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        try:
            options = {"format_whitelist": _FORMATS}
            self._container = av.open(file, "r", metadata_errors="ignore", options=options)
        except (FFmpegError, OSError, ValueError) as error:
            raise UserError(f"video {self._name} cannot be read: {_reason(error)}") from error
        streams = self._container.streams.video
        if not streams or not streams[0].codec_context:
            self._container.close()
            lack = "its codec is unknown" if streams else "it holds no pictures"
            raise UserError(f"video {self._name} cannot be read: {lack}")
        self._stream = streams[0]
        self._stream.codec_context.thread_count = 1
        self._moved = False

    @property
    def duration(self) -> float:
        if self._stream.duration:
            return self._stream.duration * self._tick
        if clock := _CLOCK.fullmatch(self._stream.metadata.get("DURATION", "")):  # Matroska
            hours, minutes, seconds = map(float, clock.groups())
            return 3600 * hours + 60 * minutes + seconds - max(0, self._first) * self._tick
        if self._container.duration:
            return self._container.duration / av.time_base - max(0, self._first) * self._tick
        return float(self.times()[-1])

    def times(self) -> Times:
        try:
            packets = self._from_beginning().demux(self._stream)
            stamps = [p.pts for p in packets if p.pts is not None and not p.is_discard]
        except (FFmpegError, OSError) as error:
            raise UserError(f"video {self._name} cannot be read: {_reason(error)}") from error
        if not stamps:
            raise UserError(f"video {self._name} has no frames")
        seconds = np.sort(np.array(stamps, np.float64)) * self._tick
        return seconds - seconds[0]

    def read(self, times: Times) -> Frames:
        order = np.argsort(times, kind="stable")
        latest = (np.asarray(times)[order] + FORGIVEN).tolist()
        try:
            shown = list(self._shown(latest))
        except (FFmpegError, OSError, ValueError) as error:
            raise UserError(f"video {self._name} cannot be read: {_reason(error)}") from error
        if len({pixels.shape for pixels in shown}) > 1:
            raise UserError(f"video {self._name} changes the size of its pictures")
        frames = np.empty((len(times), *shown[0].shape), np.uint8)
        for place, pixels in zip(order, shown, strict=True):
            frames[place] = pixels
        return frames

    def each_frame(self) -> Iterator[tuple[float, av.VideoFrame]]:
        try:
            for frame in self._intact(self._from_beginning().decode(self._stream)):
                yield self._begin(frame), frame
        except (FFmpegError, OSError, ValueError) as error:
            raise UserError(f"video {self._name} cannot be read: {_reason(error)}") from error

    def _shown(self, latest: list[float]) -> Iterator[UInt8[np.ndarray, "hh ww c"]]:
        """Yield, for every time in ascending order, the last frame that begins by then."""
        waiting = iter(latest)
        time = next(waiting)
        last = None
        for frame in self._decode_from(latest):
            pixels = None
            while time is not None and self._begin(frame) > time:
                pixels = upright(last or frame) if pixels is None else pixels
                yield pixels
                time = next(waiting, None)
            if time is None:
                return
            last = frame
        if last is None:
            raise UserError(f"video {self._name} has no frames")
        pixels = upright(last)
        yield from (pixels for _ in (time, *waiting))

    def _decode_from(self, latest: list[float]) -> Iterator[av.VideoFrame]:
        """Yield frames in order from a key frame that begins by the first time, or from the first.

        Containers seek by the time of decoding: the key frame found may come later on screen. Then
        the search goes back further, and at last to the beginning.
        """
        time = latest[0]
        back = 0.0
        while time - back > 0:
            target = self._first + math.floor((time - back) / self._tick)
            self._moved = True
            try:
                self._container.seek(target, stream=self._stream)
            except FFmpegError:  # some files cannot be sought in
                break
            frames = self._intact(self._needed(self._container, latest))
            key = next((frame for frame in frames if frame.key_frame), None)
            if key is not None and self._begin(key) <= time:
                yield key
                yield from frames
                return
            back = 2 * back + 1
        yield from self._intact(self._needed(self._from_beginning(), latest))

    def _from_beginning(self) -> InputContainer:
        """Return the container at its beginning, opened anew: some cannot be wound back."""
        if self._moved:
            self._container.close()
            self._open()
        self._moved = True
        return self._container

    def _needed(self, container: InputContainer, latest: list[float]) -> Iterator[av.VideoFrame]:
        """Decode, but for frames on screen at none of the times that no other frame refers to."""
        if self.codec not in _SKIPPING_CODECS:
            yield from container.decode(self._stream)
            return
        for packet, following in _with_following(container.demux(self._stream)):
            shown = True
            if packet.pts is not None and following is not None:
                begin, end = ((pts - self._first) * self._tick for pts in (packet.pts, following))
                shown = bisect_left(latest, begin) < bisect_left(latest, end)
            self._stream.codec_context.skip_frame = "DEFAULT" if shown else "NONREF"
            yield from packet.decode()

    def _intact(self, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """Yield frames; one that is damaged spoils those that follow."""
        begun = False
        for frame in frames:
            begun = begun or bool(frame.key_frame)
            if begun and frame.is_corrupt:
                where = f"{self._begin(frame):.2f} s from its beginning"
                raise UserError(f"video {self._name} is damaged {where}")
            yield frame

    def _begin(self, frame: av.VideoFrame) -> float:
        """Return when a frame begins, in seconds from the first."""
        if frame.pts is None:
            raise UserError(f"video {self._name} has frames without a time stamp: pack it anew")
        return (frame.pts - self._first) * self._tick


def _with_following(packets: Iterator[av.Packet]) -> Iterator[tuple[av.Packet, int | None]]:
    """Yield packets, and the stamp of the one that follows on screen as far as is known.

    It is looked for among `REORDERED` packets before and behind: a later one where it is not there.
    """
    ahead: deque[av.Packet] = deque()
    stamps: deque[int] = deque(maxlen=2 * REORDERED)
    for packet in packets:
        ahead.append(packet)
        if packet.pts is not None:
            stamps.append(packet.pts)
        if len(ahead) > REORDERED:
            yield _and_following(ahead.popleft(), stamps)
    yield from (_and_following(packet, stamps) for packet in ahead)


def _and_following(packet: av.Packet, stamps: Iterable[int]) -> tuple[av.Packet, int | None]:
    pts = packet.pts
    return packet, None if pts is None else min((s for s in stamps if s > pts), default=None)


class _DecordVideo:
    """A reader of decord; files that it opens not, or numbers wrongly, are left to PyAV."""

    def __init__(self, source: Source, name: str) -> None:
        self._decord: Any = _installed("decord")
        self._source, self._name = source, name
        self._refusals = (self._decord.DECORDError, RuntimeError, IndexError)
        self._header = _header(source, name)

    def __enter__(self) -> "_DecordVideo":
        self._reader, self._starts = None, np.zeros(0)
        codec, container = self._header.codec, self._header.container
        if codec in _DECORD_CODECS and container in _DECORD_CONTAINERS:
            try:
                self._open()
            except self._refusals:
                self._reader = None
        return self

    def __exit__(self, *_: object) -> None:
        self._reader = None

    @property
    def duration(self) -> float:
        return self._header.duration

    def read(self, times: Times) -> Frames:
        if self._reader is not None:
            shown = np.searchsorted(self._starts, np.asarray(times) + FORGIVEN, side="right") - 1
            try:
                return self._reader.get_batch(shown.clip(0).tolist()).asnumpy()
            except self._refusals:
                self._reader = None
        with _PyAVVideo(self._source, self._name) as video:
            return video.read(times)

    def _open(self) -> None:
        source = self._source
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        reader = self._decord.VideoReader(file, ctx=self._decord.cpu(0), num_threads=1)
        starts = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0]
        self._starts = starts - starts[0]
        if starts[0] >= 0:  # frames before zero are hidden, and decord counts them
            self._reader = reader


class _Header(NamedTuple):
    codec: str
    container: str
    duration: float


def _header(source: Source, name: str) -> _Header:
    if isinstance(source, bytes):
        return _read_header(source, name)
    return _file_header(str(source), name, Path(source).stat().st_mtime_ns)


@lru_cache(maxsize=100_000)  # opening a file twice for every clip would cost 3 %
def _file_header(path: str, name: str, changed: int) -> _Header:
    return _read_header(path, name)


def _read_header(source: Source, name: str) -> _Header:
    with _PyAVVideo(source, name) as video:
        return _Header(video.codec, video.container, video.duration)


_DECORD_CODECS = {"h264", "mpeg4", "vp8", "vp9"}  # not hevc: wrong frames after a seek
_DECORD_CONTAINERS = {"mov", "matroska", "avi"}  # not mpegts and flv: the same


class _TorchcodecVideo:
    """A decoder of torchcodec, which needs FFmpeg's own libraries."""

    def __init__(self, source: Source, name: str) -> None:
        decoders: Any = _installed("torchcodec.decoders")
        self._name = name
        file = source if isinstance(source, bytes) else str(source)
        try:
            self._decoder = decoders.VideoDecoder(
                file, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate"
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"video {name} cannot be read: {_reason(error)}") from error

    def __enter__(self) -> "_TorchcodecVideo":
        return self

    def __exit__(self, *_: object) -> None:
        del self._decoder

    @property
    def duration(self) -> float:
        return self._decoder.metadata.duration_seconds

    def read(self, times: Times) -> Frames:
        known = self._decoder.metadata
        begin, end = known.begin_stream_seconds, known.end_stream_seconds
        seconds = (begin + times + FORGIVEN).clip(begin, end - 2 * FORGIVEN).tolist()
        try:
            return self._decoder.get_frames_played_at(seconds=seconds).data.numpy()
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"video {self._name} cannot be read: {_reason(error)}") from error


_FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv"  # lists name files of others
_SKIPPING_CODECS = {"h264", "hevc", "mpeg4"}  # they may change their mind; dav1d may not
REORDERED = 16  # packets that a frame may be decoded before its turn, by the standard of H.264
FORGIVEN = 1e-3  # seconds that a time may lie before its frame: rounding of time stamps
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_BACKENDS = {"pyav": _PyAVVideo, "decord": _DecordVideo, "torchcodec": _TorchcodecVideo}


def _reason(error: Exception) -> str:
    """Return what FFmpeg or the system says, without number and file name."""
    return (error.strerror if isinstance(error, FFmpegError | OSError) else "") or str(error)


def _installed(module: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"no backend {package!r}: pip install {package}; or use `pyav`") from error
