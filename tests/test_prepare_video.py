import json
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from jepa_world.data.clips import load_clips
from jepa_world.data.reencoding import Job, attempt
from jepa_world.data.video import read_video, video_times, write_video

ROOT = Path(__file__).resolve().parents[1]
PREPARE = "from jepa_world.commands import main; main('prepare_video')"


def write(path, count=30, height=96, width=128):
    """Write frames whose brightness tells their number."""
    levels = 30 + 6 * np.arange(count)[:, None, None, None]
    write_video(path, np.broadcast_to(levels, (count, height, width, 3)).astype(np.uint8), fps=10)


def numbers_of(frames):
    return np.round((frames.mean((1, 2, 3)) - 30) / 6).astype(int).tolist()


def key_frames(path):
    with av.open(str(path)) as container:
        return [i for i, f in enumerate(container.decode(video=0)) if f.key_frame]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "videos" / "up" / "a.mp4")
    write(tmp_path / "videos" / "down" / "b.mov")
    return tmp_path / "videos"


def prepare(call, folder, *words):
    words = ("--data", folder, "--short-side", 48, "--gop", 5, "--workers", 1, *words)
    return call("prepare_video", *words)


def test_copies_are_small_have_key_frames_and_the_same_pictures(call, folder, tmp_path):
    before = contents(folder)
    ended = prepare(call, folder)
    assert ended.code == 0, ended.stderr
    made = tmp_path / "videos_48p"
    assert ended.stdout.splitlines()[-1] == f"everything this run made is in {made}"
    copy = made / "up" / "a.mp4"
    assert read_video(copy).shape == (30, 48, 64, 3)
    assert numbers_of(read_video(copy)) == list(range(30))
    assert np.diff([*key_frames(copy), 30]).max() <= 5
    assert contents(folder) == before
    results = results_of(made)
    assert (results["videos"], results["encoded_now"], results["frames_now"]) == (2, 2, 60)
    assert results["unreadable"] == {}


def test_labels_are_kept(call, folder, tmp_path):
    prepare(call, folder, "--run-dir", tmp_path / "out")
    clips = load_clips(tmp_path / "out")
    assert clips.names == ("down/b.mp4", "up/a.mp4")
    assert clips.class_names == load_clips(folder).class_names


def test_two_names_that_would_become_one_are_kept_apart(call, folder, tmp_path):
    write(folder / "up" / "a.mkv", count=5)
    prepare(call, folder)
    names = sorted(path.name for path in (tmp_path / "videos_48p" / "up").iterdir())
    assert names == ["a.mkv.mp4", "a.mp4.mp4"]


def test_what_cannot_be_read_is_named_and_leaves_nothing(call, folder, tmp_path):
    whole = (folder / "up" / "a.mp4").read_bytes()
    (folder / "up" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "up" / "empty.mp4").write_bytes(b"")
    (folder / "garbage.mp4").write_bytes(b"garbage" * 99)
    ended = prepare(call, folder)
    assert ended.code == 0 and "3 of 5 videos cannot be read" in ended.stdout
    unreadable = results_of(tmp_path / "videos_48p")["unreadable"]
    assert set(unreadable) == {"up/cut.mp4", "up/empty.mp4", "garbage.mp4"}
    assert "cannot be read: Invalid data" in unreadable["garbage.mp4"]
    assert len(list((tmp_path / "videos_48p").rglob("*.mp4*"))) == 2


def test_nothing_readable_ends_in_one_line_that_names_the_first(call, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"garbage")
    ended = prepare(call, tmp_path / "videos")
    assert ended.code == 2 and "none of the 1 videos can be read" in ended.stderr.splitlines()[-1]
    assert "a.mp4" in results_of(tmp_path / "videos_48p")["unreadable"]


def test_what_is_done_is_not_done_again(call, folder, tmp_path):
    prepare(call, folder)
    copy = tmp_path / "videos_48p" / "up" / "a.mp4"
    first = copy.stat().st_mtime_ns
    write(folder / "up" / "c.mp4", count=5)
    assert prepare(call, folder).code == 0
    results = results_of(tmp_path / "videos_48p")
    assert (results["videos"], results["encoded_now"]) == (3, 1)
    assert copy.stat().st_mtime_ns == first
    os.utime(folder / "up" / "a.mp4", (time.time() + 60, time.time() + 60))  # a newer source
    prepare(call, folder)
    assert results_of(tmp_path / "videos_48p")["encoded_now"] == 1
    assert copy.stat().st_mtime_ns > first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "nowhere"), "no folder 'nowhere'"),
        ((), "--data"),
        (("--data", "FOLDER", "--gop", 0), "--gop is 0: give at least 1"),
        (("--data", "FOLDER", "--short-side", 2), "--short-side is 2: give at least 16"),
        (("--data", "FOLDER", "--run-dir", "FOLDER"), "lie in each other: name another --run-dir"),
        (("--data", "FOLDER", "--run-dir", "FOLDER/x"), "lie in each other"),
        (("--data", "FOLDER", "--run-dir", "FOLDER/.."), "lie in each other"),
        (("--data", "FOLDER/empty"), "no videos in .*empty': looked for"),
    ],
)
def test_a_wrong_word_ends_in_one_line(call, folder, words, message):
    (folder / "empty").mkdir()
    before = contents(folder.parent)
    words = [str(word).replace("FOLDER", str(folder)) for word in words]
    complaint = call("prepare_video", *words).complaint()
    assert complaint.startswith("prepare_video: ")
    assert re.search(message, complaint), complaint
    assert contents(folder.parent) == before


def test_other_settings_need_another_folder(call, folder, tmp_path):
    prepare(call, folder)
    complaint = prepare(call, folder, "--gop", 3).complaint()
    assert "was made with gop 5, not 3: name another --run-dir" in complaint
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    complaint = prepare(call, folder, "--run-dir", tmp_path / "full").complaint()
    assert "is not empty: nothing is overwritten" in complaint


def test_two_processes_write_what_one_writes(folder, tmp_path):
    for workers in ("1", "2"):
        line = [sys.executable, "-c", PREPARE, "--data", str(folder), "--short-side", "48"]
        line += ["--workers", workers, "--run-dir", str(tmp_path / workers)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in ("up/a.mp4", "down/b.mp4"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


# a process that kills itself when its fourth copy is written and not yet in its place
KILLED = """
import os, pathlib, signal
replace, copies = pathlib.Path.replace, []
def die_at_the_fourth(path, target):
    if str(target).endswith(".mp4"):
        copies.append(target)
        if len(copies) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)
pathlib.Path.replace = die_at_the_fourth
"""


def test_a_kill_leaves_whole_files_only(folder, tmp_path):
    for i in range(4):
        write(folder / "up" / f"{i}.mp4", count=60, height=240, width=320)
    words = ["--data", str(folder), "--run-dir", str(tmp_path / "out"), "--workers", "1"]
    line = [sys.executable, "-c", KILLED + PREPARE, *words]
    killed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    copies = list((tmp_path / "out").rglob("*.mp4"))
    assert len(copies) == 3 and all(len(read_video(path)) for path in copies)
    assert len(load_clips(tmp_path / "out")) == 3
    line[2] = PREPARE
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "out")
    assert results["videos"] == 6 and results["encoded_now"] == 3
    assert not list((tmp_path / "out").rglob("*.unfinished"))


def test_uneven_times_odd_sizes_turns_and_colours_are_kept(tmp_path):
    source, copy = tmp_path / "source.mp4", tmp_path / "copy.mp4"
    stamps = np.cumsum(np.random.default_rng(0).integers(30, 300, 20))
    with av.open(str(source), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 49, 65, "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.color_range = 2  # full range
        stream.set_display_rotation(90)
        for i, stamp in enumerate(stamps):
            picture = np.full((49, 65, 3), (30 + 9 * i, 220 - 9 * i, 40), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = int(stamp), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert attempt(Job(source, copy, short_side=256, gop=4, crf=5)).frames == 20
    np.testing.assert_allclose(video_times(copy), video_times(source), atol=1e-3)
    before, after = read_video(source), read_video(copy)
    assert before.shape == (20, 65, 49, 3) and after.shape == (20, 64, 48, 3)
    np.testing.assert_allclose(
        after.mean((1, 2)), before.mean((1, 2)), atol=4, err_msg="colours changed"
    )
