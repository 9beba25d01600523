import json
import shutil
import sys
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_world.checkpoint import encoder_weights, load_tensors
from jepa_world.commands.train_vjepa import ClipFlags, Reader, TrainVjepa, middles
from jepa_world.config import Part, read_yaml
from jepa_world.data.clips import Clips, load_clips
from jepa_world.data.images import Images
from jepa_world.data.motion import letters, write_motion_clips
from jepa_world.methods.world_model import load_world_model

SMALL = (
    *("--steps", 4, "--batch-size", 8, "--log-every", 1, "--checkpoint-every", 2),
    *("--precision", "no", "--clips.size", 16, "--clips.frames", 4, "--clips.fps", 4),
    *("--encoder.dim", 32, "--encoder.depth", 1, "--encoder.heads", 2, "--encoder.patch", 4),
    *("--masked-predictor.width", 16, "--masked-predictor.depth", 1),
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for part, count, seed in (("train", 60, 0), ("test", 20, 1)):
        write_motion_clips(folder / part, letters(count, seed=seed), seed=seed)
    return folder


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    from jepa_world.commands import train_vjepa
    from jepa_world.config import parse

    words = [str(word) for word in (*SMALL, "--data", videos, "--run-dir", folder)]
    train_vjepa.run(parse(train_vjepa.TrainVjepa, words, program="train_vjepa"))
    return folder


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_a_run_leaves_its_numbers_pictures_and_checkpoint(run):
    results = json.loads((run / "results.json").read_text())
    assert results["probe"].keys() == {"trained", "random"}
    assert results["probe"]["trained"].keys() == {"motion", "content"}
    for name in ("masks0.png", "masks1.png", "tokens.png"):
        with Image.open(run / name) as picture:
            assert picture.size[0] > 100, name
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"knn_motion", "knn_content", "sigreg", "whole", "effective_rank"} <= last.keys()


def test_workers_read_what_the_process_itself_would(call, run, videos, tmp_path):
    words = (*SMALL, "--data", videos, "--run-dir", tmp_path / "run")
    assert call("train_vjepa", *words, "--clips.workers", 1).code == 0
    assert losses(tmp_path / "run") == losses(run)


def test_videos_in_memory_give_the_same_run(call, run, videos, tmp_path):
    words = (*SMALL, "--data", videos, "--run-dir", tmp_path / "run", "--clips.cache")
    assert call("train_vjepa", *words).code == 0
    assert losses(tmp_path / "run") == losses(run)


def test_its_config_repeats_a_run(call, run, tmp_path):
    words = ("--config", run / "config.yaml", "--run-dir", tmp_path / "run")
    assert call("train_vjepa", *words).code == 0
    assert losses(tmp_path / "run") == losses(run)


def test_a_stopped_run_goes_on_exactly(call, videos, run, tmp_path):
    words = (*SMALL, "--data", videos, "--run-dir", tmp_path / "run")
    assert call("train_vjepa", *words).code == 0
    (tmp_path / "run" / "results.json").unlink()
    done = call("train_vjepa", *words, "--resume")
    assert done.code == 0 and losses(tmp_path / "run") == losses(run)


@pytest.mark.parametrize("teacher", ["none", "ema"])
def test_stages_and_images_share_the_weights(call, videos, pictures, tmp_path, teacher):
    words = (*SMALL, "--data", videos, "--run-dir", tmp_path / "run", "--teacher", teacher)
    words += ("--predict.share", 0.6, "--predict.distance", "l1", "--predict.masks", "random")
    stages = ("--clips.stages", 0.25, 2, 12, 0.25, 4, 12, "--clips.images", pictures)
    done = call("train_vjepa", *words, *stages)
    assert done.code == 0, done.stderr
    assert np.isfinite(losses(tmp_path / "run")).all()
    saved = read_yaml(tmp_path / "run" / "config.yaml")
    assert saved["clips"]["stages"] == [[0.25, 2, 12], [0.25, 4, 12]]
    again = ("--config", tmp_path / "run" / "config.yaml", "--run-dir", tmp_path / "again")
    assert call("train_vjepa", *again).code == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_a_step_of_images_has_as_many_as_its_clips_have_steps_in_time():
    images = Images(np.arange(5, dtype=np.uint8).repeat(64).reshape(5, 8, 8, 1))
    config = TrainVjepa(clips=ClipFlags(frames=8), encoder=Part("vit", {"tubelet": 2}))
    batch = Reader(cast(Clips, None), images, config)(np.array([0, 3]), step=3)
    assert batch["index"].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]  # views of their own
    assert batch["pixels"][:, 0, 0].tolist() == [[i % 5] * 3 for i in batch["index"].tolist()]


def test_an_encoder_of_images_starts_one_of_videos(call, videos, pictures, tmp_path):
    encoder = SMALL[SMALL.index("--encoder.dim") :][:8]
    images = (
        *("--steps", 1, "--batch-size", 8, "--precision", "no", "--run-dir", tmp_path / "images"),
        *("--encoder.positions", "rotary", "--data", pictures, "--image-size", 16),
    )
    assert call("train_ijepa", *images, *encoder).code == 0
    words = (*SMALL, "--data", videos, "--run-dir", tmp_path / "run", "--lr", 0)
    assert call("train_vjepa", *words, "--start", tmp_path / "images").code == 0
    of_images, of_videos = (
        load_tensors(tmp_path / name / "checkpoint" / "model.safetensors")[0]
        for name in ("images", "run")
    )
    first, second = of_videos["encoder.embed.weight"].chunk(2, 1)
    assert np.allclose(first + second, of_images["encoder.embed.weight"], atol=1e-6)
    assert not np.allclose(first, second)  # what moves shows
    words = (*SMALL, "--data", videos, "--run-dir", tmp_path / "other", "--encoder.depth", 2)
    done = call("train_vjepa", *words, "--start", tmp_path / "images")
    assert "blocks.1" in done.complaint()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--clips.frames", 0), "--clips of 0 frames"),
        (("--clips.frames", 5), "does not divide into patches"),
        (("--clips.stages", 0.9, 2, 16, 0.9, 4, 16), "add up to 1 at most"),
        (("--views", 0, 0), "--views"),
        (("--clips.frames", 5, "--data", "nowhere"), "does not divide into patches"),  # at once
        (("--predict.masks", "tall"), "tall"),
        (("--predict.share", 0), "--predict.share 0"),
        (("--predict.seen", 1), "--predict.seen 1"),
        (("--predict.final-weight", 11), "--predict.final-weight 11"),
        (("--teacher", "ema", "--predict.no-stop-gradient"), "targets have no gradient"),
        (("--teacher", "ema", "--predict.final-weight", 1), "a teacher needs no SIGReg"),
        (("--predict.distance", "l3"), "l3"),
        (("--data", "nowhere"), "no videos at 'nowhere'"),
        (("--start", "nowhere"), "nowhere"),
        (("--clips.cache", "--clips.stages", 0.5, 4, 8), "keeps 16 pixels"),
    ],
)
def test_bad_input_is_one_line(call, videos, tmp_path, words, expected):
    done = call("train_vjepa", *SMALL, "--data", videos, "--run-dir", tmp_path / "run", *words)
    assert expected in done.complaint()


def test_damaged_videos_are_replaced_and_named(call, tmp_path, caplog):
    listed = write_motion_clips(tmp_path / "videos", letters(40, seed=0), seed=0)
    for number in (3, 4):
        broken = listed.parent / f"{number:06d}.mp4"
        broken.write_bytes(broken.read_bytes()[:200])
    done = call("train_vjepa", *SMALL, "--data", listed, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.stderr
    assert {"000003.mp4", "000004.mp4"} & {w for r in caplog.records for w in r.message.split("'")}


def test_probes_of_videos_are_printed_beside_what_costs_nothing(call, run, videos, tmp_path):
    """The encoder was trained on clips of 4 frames; it sees 8 as two clips."""
    folder = tmp_path / "probe"
    words = ("--data", videos, "--checkpoint", run, "--frames", 8, "--fps", 8, "--size", 16)
    words += ("--supervised-steps", 2, "--precision", "no", "--run-dir", folder)
    done = call("probe_video", *words, "--frame-by-frame")
    assert done.code == 0, done.stderr
    rows = json.loads((folder / "results.json").read_text())["features"]["motion"]
    assert {"raw pixels", "mean frame", "random encoder", str(run)} <= rows.keys()
    assert {"random encoder, frame by frame", f"{run}, frame by frame"} <= rows.keys()
    assert {"supervised, in order", "supervised, shuffled"} <= rows.keys()
    assert rows[str(run)].keys() == {"attentive", "shuffled", "linear", "knn"}
    assert "motion" in done.stdout and "content" in done.stdout


def test_an_encoder_is_not_judged_on_clips_that_are_no_whole_number_of_its_own(call, run, videos):
    words = ("--data", videos, "--checkpoint", run, "--frames", 6, "--size", 16)
    assert "takes (4, 3, 16, 16)" in call("probe_video", *words).complaint()


def test_a_predictor_is_trained_on_the_frozen_encoder_of_a_run(call, run, tiny_data, tmp_path):
    words = (
        *(
            "--data",
            tiny_data,
            "--encoder",
            run,
            "--encoder.normalise",
            "--run-dir",
            tmp_path / "ac",
        ),
        *("--predictor", "block_causal", "--predictor.width", 32, "--predictor.normalise"),
        *("--steps", 2, "--batch-size", 4, "--precision", "no", "--log-every", 1),
    )
    done = call("train_world_model", *words)
    assert done.code == 0, done.stderr
    line = json.loads((tmp_path / "ac" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"teacher_forcing", "rollout", "open_loop_error"} <= line.keys()
    before, after = (encoder_weights(folder / "checkpoint")[0] for folder in (run, tmp_path / "ac"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    _, description = load_world_model(tmp_path / "ac")
    assert description["encoder"]["tubelet"] == 2 and description["encoder"]["normalise"]


def test_a_part_from_outside_the_package_is_not_imported_from_a_run(call, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = copy / "checkpoint" / "config.yaml"
    config.write_text(config.read_text().replace("name: vit", "name: antigravity:Encoder"))
    ended = call("train_world_model", "--encoder", copy, "--run-dir", tmp_path / "run")
    assert "antigravity:Encoder: name it yourself" in ended.complaint()
    assert "antigravity" not in sys.modules


def test_the_label_of_a_replaced_video_is_that_of_the_one_that_is_seen(tmp_path):
    listed = write_motion_clips(tmp_path / "videos", letters(30, seed=0), seed=0)
    (listed.parent / "000003.mp4").write_bytes(b"no video" * 50)
    clips = load_clips(listed)
    pixels, seen = middles(clips, ClipFlags(frames=4, fps=8.0, size=16))
    assert len(seen) == len(clips) == 30 and seen.names[3] != "000003.mp4"
    again = clips.names.index(seen.names[3])
    assert seen.classes["motion"][3] == clips.classes["motion"][again]
    np.testing.assert_array_equal(pixels[3], pixels[again])
