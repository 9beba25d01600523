import doctest
from typing import Any

import av
import numpy as np
import pytest
from av.error import FFmpegError

import jepa_world.data.video
from jepa_world.data.video import read_video, video_times, write_video
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
