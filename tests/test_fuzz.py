"""Bytes of chance in the place of every kind of file: one line at most, sources as they were."""

import hashlib
import importlib.util
import io
import logging
import warnings
from functools import partial
from pathlib import Path

import foreign_layouts as layouts
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jepa_world.commands.plan import Plan
from jepa_world.commands.train_vjepa import TrainVjepa
from jepa_world.commands.train_world_model import TrainWorldModel
from jepa_world.config import parse, read_json
from jepa_world.data.clips import load_clips
from jepa_world.data.images import load_images, read_idx
from jepa_world.data.trajectories import Trajectories, write_shard
from jepa_world.data.video import write_video
from jepa_world.encoders.pretrained import load_ijepa
from jepa_world.methods.world_model import load_world_model
from jepa_world.registry import UserError

ROOT = Path(__file__).resolve().parents[1]
PIECES = [
    b"\0",
    b"\xff",
    b"\xff" * 8,
    bytes(64),
    b"{",
    b"[" * 50,
    b"]",
    b": *a",
    b"nan",
    b"-1",
    b"1e999",
]


def counts(few):
    """Return how many examples a property is tried on: a few, and as a slow test many."""
    return pytest.mark.parametrize(
        "count",
        [pytest.param(few, id="few"), pytest.param(30 * few, id="m", marks=pytest.mark.slow)],
    )


def holds(count, strategy, check):
    """Try a property on examples that are the same every time."""
    settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )(given(strategy)(check))()


def damages():
    """Return ways to spoil bytes: places as shares of the whole, and what comes there."""
    place = st.floats(0, 1, exclude_max=True)
    piece = st.sampled_from(PIECES) | st.binary(min_size=1, max_size=4)
    one = st.tuples(st.sampled_from(["over", "into", "cut", "drop", "swap"]), place, place, piece)
    return st.lists(one, min_size=1, max_size=4)


def spoilt(content, damage):
    """Return bytes that are spoilt."""
    for how, share, other, piece in damage:
        at, to = sorted((int(share * len(content)), int(other * len(content))))
        if how == "over":
            content = content[:at] + piece + content[at + len(piece) :]
        elif how == "into":
            content = content[:at] + piece + content[at:]
        elif how == "cut":
            content = content[:at]
        elif how == "drop":
            content = content[:at] + content[min(to, at + 64) :]
        else:
            content = content[:at] + content[to : to + 16] + content[at + 16 :]
    return content


def digest(folder):
    """Return a hash of all names and contents below a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(path.relative_to(folder).as_posix().encode())
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


def refused_or_done(folder, use):
    """Use a folder: it may be refused in one line, and is as it was."""
    before = digest(folder)
    try:
        use()
    except UserError as error:
        assert str(error).strip()
    assert digest(folder) == before


def fuzz_file(count, file, use):
    """Spoil one file of a folder in many ways; `use` it each time."""
    whole = file.read_bytes()

    def check(damage):
        file.write_bytes(spoilt(whole, damage))
        refused_or_done(file.parent, use)

    holds(count, damages(), check)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@counts(30)
def test_a_configuration_file_of_chance(count, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes((ROOT / "configs" / "world_reach.yaml").read_bytes())
    use = partial(parse, TrainWorldModel, ["--config", str(file)], program="train")
    fuzz_file(count, file, use)


@counts(30)
def test_a_configuration_of_values_of_chance(count, tmp_path):
    import yaml

    keys = ["steps", "encoder", "predictor", "predict", "columns", "regulariser", "data", "trust"]

    def check(given):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(given))
        use = partial(parse, TrainWorldModel, ["--config", str(file)], program="train")
        refused_or_done(tmp_path, use)

    holds(
        count,
        st.dictionaries(st.sampled_from(keys) | st.text(max_size=5), values, max_size=3),
        check,
    )


@counts(30)
def test_flags_of_chance(count):
    words = ["--steps", "--encoder", "--planner", "vit", "cem", "--encoder.dim", "--clips.stages"]
    words += [
        "--objective",
        "--trust",
        "--config",
        "--resume",
        "--run-dir",
        "3",
        "-1",
        "nan",
        "a:b",
    ]

    def check(given):
        for config_class in (Plan, TrainVjepa):
            try:
                parse(config_class, given, program="command")
            except UserError as error:
                assert str(error).strip()

    holds(count, st.lists(st.sampled_from(words) | st.text(max_size=6), max_size=6), check)


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
@counts(25)
def test_a_checkpoint_of_chance(count, name, tiny_run, tmp_path):
    for file in (tiny_run / "checkpoint").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fuzz_file(count, tmp_path / name, lambda: load_world_model(tmp_path))


@counts(15)
def test_the_description_of_a_checkpoint_of_chance(count, tiny_run, tmp_path):
    import yaml

    from jepa_world.config import read_yaml

    for file in (tiny_run / "checkpoint").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    good = read_yaml(tmp_path / "config.yaml")
    options = st.dictionaries(st.sampled_from(sorted(good["encoder"])), values, max_size=2)

    def check(given):
        key, value, changed = given
        description = good | {"encoder": good["encoder"] | changed, key: value}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(description))
        refused_or_done(tmp_path, lambda: load_world_model(tmp_path))

    holds(count, st.tuples(st.sampled_from(sorted(good)), values, options), check)


@counts(20)
def test_weights_of_others_of_chance(count, tmp_path):
    import torch

    torch.save({"encoder": {"embed.weight": torch.zeros(2, 3)}}, tmp_path / "w.pth")

    def use():
        try:
            load_ijepa(tmp_path / "w.pth")
        except ValueError as error:
            raise UserError(str(error)) from error

    fuzz_file(count, tmp_path / "w.pth", use)
    (tmp_path / "config.json").write_text('{"architectures": ["Dinov2Model"], "depth": 3}')
    fuzz_file(count, tmp_path / "config.json", lambda: read_json(tmp_path / "config.json"))


def episode(frames, seed):
    random = np.random.default_rng(seed)
    return {
        "pixels": random.integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8),
        "action": random.uniform(-1, 1, (frames, 2)).astype(np.float32),
        "state": random.standard_normal((frames, 3)).astype(np.float32),
    }


EPISODES = [episode(5, 0), episode(4, 1), episode(6, 2)]


def read_all(path):
    data = Trajectories(path, cache_bytes=0)
    data.read(data.windows(3), 3)


def one_store(folder, jpeg):
    write_shard(folder / "a.h5", EPISODES, jpeg=jpeg)
    return folder / "a.h5"


STORES = {
    "ours": partial(one_store, jpeg=False),
    "ours, JPEG": partial(one_store, jpeg=True),
    "robomimic": lambda folder: layouts.write_robomimic(folder / "a.hdf5", EPISODES),
    "OGBench": lambda folder: layouts.write_ogbench(folder / "a.npz", EPISODES),
}


@pytest.mark.parametrize("name", STORES)
@counts(25)
def test_a_store_of_chance(count, name, tmp_path):
    file = STORES[name](tmp_path)
    fuzz_file(count, file, partial(read_all, file))


@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="needs pyarrow")
@pytest.mark.parametrize("name", ["lerobot2", "lerobot3", "minari"])
@counts(8)
def test_a_folder_with_parquet_of_chance(count, name, tmp_path):
    write = {
        "lerobot2": partial(layouts.write_lerobot_v2, embedded=True),
        "lerobot3": partial(layouts.write_lerobot_v3, embedded=True),
        "minari": partial(layouts.write_minari_arrow, kind="parquet"),
    }[name]
    folder = write(tmp_path / "a", EPISODES)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for file in files:
        whole = file.read_bytes()
        fuzz_file(max(1, count * 4 // len(files)), file, partial(read_all, folder))
        file.write_bytes(whole)


@counts(20)
def test_a_dataset_yaml_of_chance(count, tmp_path):
    one_store(tmp_path, False)
    file = tmp_path / "dataset.yaml"
    file.write_text("settings: {episodes: 3, env: a}\nversions: {av: '1'}\naction: {mean: [0]}\n")
    fuzz_file(count, file, lambda: (read_all(tmp_path), Trajectories(tmp_path).env))


@counts(30)
def test_a_video_of_chance(count, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    random = np.random.default_rng(0)
    write_video(tmp_path / "a.mp4", random.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), 4)

    def use():
        clips = load_clips(tmp_path)
        clips.read(np.array([0]), frames=3, fps=4, size=16, seed=0, step=0)
        clips.cached(size=16)

    fuzz_file(count, tmp_path / "a.mp4", use)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
@counts(15)
def test_a_picture_of_chance(count, kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"a.{kind}")
    fuzz_file(count, tmp_path / f"a.{kind}", lambda: load_images(tmp_path, size=8))


@counts(20)
def test_an_archive_a_list_and_an_idx_file_of_chance(count, tmp_path):
    import tarfile

    random = np.random.default_rng(0)
    video, picture = tmp_path / "v.mp4", io.BytesIO()
    write_video(video, random.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), 4)
    Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(picture, "png")
    for name, content in {"v.mp4": video.read_bytes(), "p.png": picture.getvalue()}.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for number in range(3):
                member = tarfile.TarInfo(f"{number}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (tmp_path / "l.csv").write_text("path,label,speed\nv.mp4,3,.5\nv.mp4,4,1\n")
    (tmp_path / "l.txt").write_text("v.mp4 3\nv.mp4 4\n")
    (tmp_path / "i").write_bytes(b"\0\0\x08\x02\0\0\0\x04\0\0\0\x04" + bytes(16))
    words = {"frames": 2, "fps": 4, "size": 16, "seed": 0, "step": 0}
    for name, use in {
        "v.mp4.tar": lambda file: load_clips(file).read(np.array([0]), **words),
        "p.png.tar": lambda file: load_images(file, size=8),
        "l.csv": load_clips,
        "l.txt": load_clips,
        "i": read_idx,
    }.items():
        fuzz_file(count, tmp_path / name, partial(use, tmp_path / name))


@pytest.fixture(autouse=True)
def no_matter_what_libraries_warn_of():
    """A warning of Pillow or FFmpeg about bytes of chance is no traceback."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
