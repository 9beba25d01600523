import doctest
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from av.codec import Codec
from av.error import FFmpegError

import jepa_world.data.video
from jepa_world.data.video import (
    each_frame,
    open_video,
    read_video,
    upright,
    video_times,
    write_video,
)
from jepa_world.registry import UserError

COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [120, 120, 120], [240, 240, 20]])


def frames(height=32, width=48, count=5):
    """Return frames of one colour each, so that a frame is told from its neighbours."""
    return np.broadcast_to(COLOURS[:count, None, None], (count, height, width, 3)).astype(np.uint8)


def write_mpeg4(path, pictures, codec="mpeg4"):
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def path(tmp_path):
    write_video(tmp_path / "colours.mp4", frames(), fps=10)
    return tmp_path / "colours.mp4"


def test_examples_in_docstrings_hold():
    assert doctest.testmod(jepa_world.data.video).failed == 0


def test_what_is_written_is_read_within_the_codecs_error(path):
    np.testing.assert_allclose(read_video(path).astype(int), frames().astype(int), atol=12)


def test_the_file_is_h264_that_browsers_play(path):
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_odd_sizes_are_padded(tmp_path):
    write_video(tmp_path / "odd.mp4", frames(31, 33), fps=10)
    assert read_video(tmp_path / "odd.mp4").shape == (5, 32, 34, 3)


def test_frames_are_those_on_screen_at_the_times(path):
    np.testing.assert_allclose(video_times(path), [0.0, 0.1, 0.2, 0.3, 0.4], atol=1e-6)
    chosen = read_video(path, np.array([0.4, 0.05, 0.1, 0.1, 9.0]))
    np.testing.assert_array_equal(chosen, read_video(path)[[4, 0, 1, 1, 4]])


def test_a_codec_that_decord_may_not_open_is_read(tmp_path):
    try:
        write_mpeg4(tmp_path / "av1.mp4", frames(64, 64), codec="libsvtav1")
    except (FFmpegError, ValueError):
        pytest.skip("this PyAV writes no AV1")
    read = read_video(tmp_path / "av1.mp4")
    np.testing.assert_allclose(read.astype(int), frames(64, 64).astype(int), atol=20)


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_what_is_no_video_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    for read in (read_video, video_times):
        with pytest.raises(UserError, match=r"broken\.mp4 cannot be read") as refused:
            read(path)
        assert "\n" not in str(refused.value)


def test_a_missing_video_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.mp4 does not exist"):
        read_video(tmp_path / "nowhere.mp4")


def test_a_truncated_video_is_refused(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"colours\.mp4"):
        read_video(path)


def test_no_frames_and_unwritable_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no frames"):
        write_video(tmp_path / "empty.mp4", frames()[:0], fps=10)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_video(tmp_path / "file" / "a.mp4", frames(), fps=10)


BACKENDS = ("pyav", "decord")
CODECS = [
    *(("libx264", "mp4"), ("libx264", "mkv"), ("libx265", "mp4"), ("libvpx-vp9", "webm")),
    *(("libsvtav1", "mp4"), ("libaom-av1", "mkv"), ("mpeg4", "avi"), ("libx264", "ts")),
]


def counting(count, size=(64, 64)):
    """Return frames of a brightness of 30 + 5 i, the top left black, so that a turn is seen."""
    levels = 30 + 5 * np.arange(count)[:, None, None, None] % 220
    made = np.broadcast_to(levels, (count, *size, 3)).astype(np.uint8)
    made[:, : size[0] // 4, : size[1] // 4] = 0
    return made


def encode(path, stamps, pictures=None, *, codec="libx264", pixels="yuv420p", turn=0, options=None):
    """Write frames that begin at `stamps` (milliseconds): `counting` ones, if none are given."""
    pictures = counting(len(stamps)) if pictures is None else pictures
    try:
        Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.bit_rate = 4_000_000 if codec == "mpeg4" else 0
        stream.pix_fmt, stream.codec_context.gop_size = pixels, 12
        stream.codec_context.time_base = Fraction(1, 10 if codec == "mpeg4" else 1000)
        stream.set_display_rotation(turn)
        for stamp, picture in zip(stamps, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = int(stamp), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers_of(frames):
    """Return the numbers of the frames that `encode` made."""
    height, width = frames.shape[1:3]
    middle = frames[:, height // 2 : -height // 4, width // 2 : -width // 4]
    return np.round((middle.mean((1, 2, 3)) - 30) / 5).astype(int).tolist()


@pytest.mark.parametrize(("codec", "suffix"), CODECS)
def test_all_backends_give_the_frames_of_the_times(tmp_path, codec, suffix):
    path = encode(tmp_path / f"a.{suffix}", range(0, 4000, 100), codec=codec)
    times = np.array([3.91, 0.05, 2.0, 2.04, 1.3, 3.2, 99.0])
    for backend in BACKENDS:
        assert numbers_of(read_video(path, times, backend=backend)) == [39, 0, 20, 20, 13, 32, 39]
        for time in (0.0, 1.19, 1.2, 3.0):  # each sought for itself
            with open_video(path, backend=backend) as video:
                assert numbers_of(video.read(np.array([time]))) == [int(10 * time + 1e-6)]
                assert video.duration == pytest.approx(4.0, abs=0.11)
    one, two = (read_video(path, times, backend=backend) for backend in BACKENDS)
    assert np.abs(one.astype(int) - two).max() <= 2


@pytest.mark.parametrize(("codec", "suffix"), CODECS)
def test_frames_that_are_left_out_change_no_others(tmp_path, codec, suffix):
    random = np.random.default_rng(0)
    world = np.kron(random.integers(0, 255, (40, 40, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    pictures = [world[i : i + 64, 2 * i : 2 * i + 64] for i in range(48)]
    stamps = np.arange(48) * 100
    if suffix in ("mp4", "mkv") and codec == "libx264":
        stamps = np.cumsum(random.integers(20, 300, 48))
    path = encode(tmp_path / f"a.{suffix}", stamps, pictures, codec=codec)
    begins, frames = zip(*each_frame(path), strict=True)
    whole = np.stack([upright(frame) for frame in frames])
    for _ in range(20):
        times = random.uniform(0, begins[-1] + 0.1, random.integers(1, 6))
        shown = np.searchsorted(begins, times + 1e-3, side="right") - 1
        np.testing.assert_array_equal(read_video(path, times), whole[shown])


def test_frames_of_uneven_lengths_are_those_on_screen(tmp_path):
    stamps = np.cumsum(np.random.default_rng(0).integers(20, 400, 40)) - 20
    stamps -= stamps[0]
    path = encode(tmp_path / "uneven.mp4", stamps)
    np.testing.assert_allclose(video_times(path), stamps / 1000, atol=1e-3)
    times = np.arange(0, stamps[-1] / 1000, 0.137)
    expected = np.searchsorted(stamps / 1000, times + 1e-3, side="right") - 1
    for backend in BACKENDS:
        assert numbers_of(read_video(path, times, backend=backend)) == expected.tolist()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_late_beginning_is_time_zero(tmp_path, suffix):
    path = encode(tmp_path / f"late.{suffix}", range(500, 3500, 100))
    for backend in BACKENDS:
        assert numbers_of(read_video(path, np.array([0.0, 1.5]), backend=backend)) == [0, 15]
        with open_video(path, backend=backend) as video:
            assert video.duration == pytest.approx(3.0, abs=0.01)


def test_frames_that_an_edit_list_hides_are_not_seen(tmp_path):
    path = encode(tmp_path / "edited.mp4", range(-500, 3500, 100))
    assert len(video_times(path)) == 35
    for backend in BACKENDS:
        assert numbers_of(read_video(path, np.array([0.0, 1.5]), backend=backend)) == [5, 20]
        assert numbers_of(read_video(path, backend=backend)) == list(range(5, 40))


def test_open_groups_of_pictures_are_sought_rightly(tmp_path):
    """Frames shown before a key frame and decoded after it belong to the group before."""
    path = encode(
        tmp_path / "open.mp4", range(0, 4000, 100), options={"x264-params": "open-gop=1:bframes=3"}
    )
    for time in np.arange(0, 4, 0.1):
        assert numbers_of(read_video(path, np.array([time]))) == [round(10 * time)]


@pytest.mark.parametrize("pixels", ["gray", "yuv444p", "yuv420p10le"])
def test_grey_and_deep_pictures_are_rgb(tmp_path, pixels):
    path = encode(tmp_path / "a.mp4", range(0, 500, 100), pixels=pixels)
    one, two = (read_video(path, backend=backend) for backend in BACKENDS)
    assert one.shape == (5, 64, 64, 3) and np.all(np.diff(one[:, 48, 48, 0].astype(int)) > 2)
    assert np.abs(one.astype(int) - two).max() <= 2


def test_odd_sizes_are_read(tmp_path):
    path = encode(
        tmp_path / "odd.webm", range(0, 500, 100), counting(5, (49, 63)), codec="libvpx-vp9"
    )
    one, two = (read_video(path, backend=backend) for backend in BACKENDS)
    assert one.shape == (5, 49, 63, 3) and np.abs(one.astype(int) - two).max() <= 2


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_turn_noted_in_the_file_is_made(tmp_path, turn):
    path = encode(tmp_path / "turned.mp4", range(0, 300, 100), counting(3, (48, 64)), turn=turn)
    one, two = (read_video(path, backend=backend) for backend in BACKENDS)
    assert one.shape == (3, *((48, 64) if turn == 180 else (64, 48)), 3)
    assert np.abs(one.astype(int) - two).max() <= 2


def test_content_is_read_as_the_file_is(path):
    for backend in BACKENDS:
        of_bytes = read_video(path.read_bytes(), np.array([0.2]), backend=backend)
        np.testing.assert_array_equal(of_bytes, read_video(path, np.array([0.2])))


def test_each_frame_comes_with_its_time(path):
    times, pictures = zip(*each_frame(path), strict=True)
    np.testing.assert_allclose(times, video_times(path))
    np.testing.assert_array_equal(np.stack([upright(f) for f in pictures]), read_video(path))


def invert(path, *shares):
    """Invert 2000 bytes at these shares of a file."""
    content = bytearray(path.read_bytes())
    for share in shares:
        place = int(share * len(content))
        content[place : place + 2000] = bytes(255 - x for x in content[place : place + 2000])
    path.write_bytes(content)


def test_only_what_lies_between_a_key_frame_and_the_last_time_is_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3)).astype(np.uint8)
    path = tmp_path / "rot.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.height = stream.width = 64
        stream.pix_fmt, stream.codec_context.gop_size = "yuv420p", 5
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    whole = read_video(path)
    invert(path, 0.1, 0.9)
    np.testing.assert_array_equal(read_video(path, np.array([1.5, 2.4])), whole[[15, 24]])
    for times in (np.array([0.0, 0.9]), np.array([3.0, 3.9]), None):
        with pytest.raises(UserError, match=r"rot\.mp4 (is damaged 0|is damaged 3|cannot be read)"):
            read_video(path, times)


def test_a_file_without_frames_is_refused(tmp_path):
    path = tmp_path / "none.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    for backend in BACKENDS:
        with pytest.raises(UserError, match=r"none\.mp4 (has no frames|cannot be read)"):
            read_video(path, np.array([0.0]), backend=backend)


def test_sound_alone_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 16000
        container.mux([*stream.encode(silence), *stream.encode()])
    with pytest.raises(UserError, match="it holds no pictures"):
        read_video(path)


def test_an_unknown_codec_is_refused(path):
    path.write_bytes(path.read_bytes().replace(b"avc1", b"what"))
    for backend in BACKENDS:
        with pytest.raises(UserError, match="cannot be read: its codec is unknown"):
            read_video(path, np.array([0.0]), backend=backend)


def test_sound_that_is_longer_does_not_lengthen_the_pictures(tmp_path):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        sound = container.add_stream("aac", rate=16000)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for picture in frames(64, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 32000), np.float32), "fltp", "mono")
        silence.sample_rate = 16000
        container.mux([*stream.encode(), *sound.encode(silence), *sound.encode()])
    for backend in BACKENDS:
        with open_video(tmp_path / "sound.mkv", backend=backend) as video:
            assert video.duration == pytest.approx(0.5, abs=0.11)


def test_pictures_that_change_their_size_are_refused(tmp_path):
    small = encode(tmp_path / "a.ts", range(0, 1000, 100)).read_bytes()
    large = encode(tmp_path / "b.ts", range(1000, 2000, 100), counting(10, (96, 96))).read_bytes()
    with pytest.raises(UserError, match="changes the size of its pictures"):
        read_video(small + large)


def test_an_unknown_backend_and_one_not_installed_are_named(path):
    with pytest.raises(UserError, match="unknown backend 'decrod'; nearest: decord"):
        open_video(path, backend="decrod")
    try:
        import torchcodec  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install torchcodec; or use `pyav`"):
            open_video(path, backend="torchcodec")
