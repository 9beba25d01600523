"""Compare the readers of data/layouts.py and data/parquet.py with the libraries they stand for.

    python benchmarks/real_layouts.py

For each library that is installed (pip install minari[all] lerobot ogbench robomimic d4rl
stable-worldmodel; they do not all fit into one environment): what it writes is read here, and what
it reads of a file is what is read here, frame by frame. Where a library writes nothing without a
simulator of its own (robomimic, D4RL, OGBench) the file is that of `foreign_layouts.py`. A line a
check; a difference ends the script.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import foreign_layouts as layouts
import numpy as np
from gymnasium.spaces import Box, Dict

from jepa_world.data.trajectories import Trajectories, write_shard

LENGTHS = (12, 30, 9, 17, 21)
SIZE = 64


def main() -> None:
    logging.disable(logging.WARNING)
    episodes = make_episodes()
    for library, check in CHECKS.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                for line in check(Path(folder), episodes):
                    print(f"{library} {version(library)}: {line}")
        except ImportError as error:
            print(f"{library}: not installed ({error})")


def make_episodes() -> layouts.Episodes:
    """Return episodes every frame of which has colours of its own, in two halves."""
    episodes: list[dict[str, np.ndarray]] = []
    for seed, frames in enumerate(LENGTHS):
        generator = np.random.default_rng(seed)
        level = (20 + 6 * np.arange(frames) + 7 * seed)[:, None, None, None]
        pixels = np.broadcast_to(level, (frames, SIZE, SIZE + 32, 3)).astype(np.uint8)
        pixels[:, :, SIZE // 2 :, 0] = generator.integers(0, 256, (frames, 1, 1))
        action = generator.uniform(-1, 1, (frames, 2)).astype(np.float32)
        action[-1] = 0.0
        state = generator.standard_normal((frames, 4)).astype(np.float32)
        episodes.append({"pixels": pixels, "action": action, "state": state})
    return episodes


def assert_read(path: Path, episodes: layouts.Episodes, *, close: float = 0, **named: Any) -> str:
    """Assert that a dataset holds these episodes; return the layout that was found."""
    for cache_bytes in (0, 2**30):
        data = Trajectories(path, cache_bytes=cache_bytes, **named)
        np.testing.assert_array_equal(data.lengths, layouts.lengths(episodes))
        first = 0
        for episode in episodes:
            length = len(episode["action"])
            rows = {name: rows[0] for name, rows in data.read(np.array([first]), length).items()}
            np.testing.assert_array_equal(rows["action"][:-1], episode["action"][:-1])
            difference = rows["pixels"].astype(int) - episode["pixels"]
            assert np.abs(difference).mean((1, 2, 3)).max() <= close, "other frames"
            first += length
    return data.layout


def stable_worldmodel(folder: Path, episodes: layouts.Episodes) -> Iterator[str]:
    theirs = module("stable_worldmodel.data.formats.hdf5")
    with theirs.HDF5Writer(folder / "theirs.h5") as writer:
        writer.write_episodes([{k: list(v) for k, v in e.items()} for e in episodes])
    assert_read(folder / "theirs.h5", episodes)
    yield "its HDF5 is read here"
    write_shard(folder / "ours.h5", episodes)
    dataset = theirs.HDF5Dataset(path=folder / "ours.h5", num_steps=4)
    ours = Trajectories(folder / "ours.h5")
    windows = ours.windows(4)
    assert len(dataset) == len(windows)
    for window, start in enumerate(windows):
        steps, batch = dataset[window], ours.read(np.array([start]), 4)
        np.testing.assert_array_equal(steps["pixels"].permute(0, 2, 3, 1), batch["pixels"][0])
        np.testing.assert_array_equal(steps["action"], batch["action"][0])
    yield "our HDF5 is read there, all windows alike"


def robomimic(folder: Path, episodes: layouts.Episodes) -> Iterator[str]:
    path = layouts.write_robomimic(folder / "demo.hdf5", episodes)
    module("robomimic.utils.obs_utils").initialize_obs_utils_with_obs_specs(
        {"obs": {"rgb": ["agentview_image"]}}
    )
    dataset = module("robomimic.utils.dataset").SequenceDataset(
        str(path),
        obs_keys=["agentview_image"],
        dataset_keys=["actions"],
        seq_length=4,
        pad_seq_length=False,
        load_next_obs=False,
    )
    ours = Trajectories(path)
    windows = ours.windows(4)
    assert len(dataset) == len(windows)
    for window, start in enumerate(windows):
        theirs, batch = dataset[window], ours.read(np.array([start]), 4)
        frames = np.asarray(theirs["obs"]["agentview_image"])
        np.testing.assert_array_equal(frames, batch["pixels"][0])
        np.testing.assert_array_equal(theirs["actions"], batch["action"][0])
    yield "of one file, all windows alike"


def d4rl(folder: Path, episodes: layouts.Episodes) -> Iterator[str]:
    library, spaces = module("d4rl"), module("gym").spaces
    path = layouts.write_d4rl(folder / "d4rl.hdf5", episodes)
    env = module("d4rl.offline_env").OfflineEnv()
    env.observation_space = spaces.Box(0, 255, (SIZE, SIZE + 32, 3), np.uint8)
    env.action_space = spaces.Box(-1, 1, (2,), np.float32)
    arrays = {k: v for k, v in env.get_dataset(str(path)).items() if "metadata" not in k}
    theirs = list(library.sequence_dataset(env, arrays))
    found = [{"pixels": e["observations"], "action": e["actions"]} for e in theirs]
    assert_read(path, found)
    yield f"of one file, {len(found)} episodes cut alike"


def minari(folder: Path, episodes: layouts.Episodes) -> Iterator[str]:
    storages = module("minari.dataset.minari_storage")
    buffers = module("minari.data_collector.episode_buffer")
    space = Dict(
        {
            "pixels": Box(0, 255, (SIZE, SIZE + 32, 3), np.uint8),
            "state": Box(-9, 9, (4,), np.float32),
        }
    )
    for kind in ("hdf5", "arrow", "parquet"):
        for jpeg in (True, False):
            path = folder / f"{kind}{jpeg}" / "data"
            path.mkdir(parents=True)
            storage = storages.MinariStorage.new(
                path, space, Box(-1, 1, (2,)), data_format=kind, jpeg_encoding=jpeg
            )
            storage.update_episodes(
                buffers.EpisodeBuffer(
                    id=number,
                    observations={"pixels": episode["pixels"], "state": episode["state"]},
                    actions=episode["action"][:-1],
                    rewards=list(np.zeros(len(episode["action"]) - 1)),
                    terminations=[False] * (len(episode["action"]) - 1),
                    truncations=[False] * (len(episode["action"]) - 1),
                )
                for number, episode in enumerate(episodes)
            )
            theirs = storage.get_episodes(range(len(episodes)))
            found = [
                {
                    "pixels": episode["observations"]["pixels"],
                    "action": np.concatenate([episode["actions"], np.zeros((1, 2), np.float32)]),
                }
                for episode in theirs
            ]
            assert_read(path.parent, found)
            yield f"its {kind} with {'JPEG' if jpeg else 'raw frames'} is read alike"


def ogbench(folder: Path, episodes: layouts.Episodes) -> Iterator[str]:
    path = layouts.write_ogbench(folder / "visual.npz", episodes)
    theirs = module("ogbench.utils").load_dataset(
        str(path), ob_dtype=np.uint8, compact_dataset=True
    )
    ends = np.flatnonzero(theirs["valids"] == 0) + 1
    found = [
        {"pixels": pixels, "action": action}
        for pixels, action in zip(
            np.split(theirs["observations"], ends)[:-1],
            np.split(theirs["actions"], ends)[:-1],
            strict=True,
        )
    ]
    assert_read(path, found)
    np.savez(folder / "compact.npz", **theirs)
    assert_read(folder / "compact.npz", found)
    yield f"of one file, {len(found)} episodes alike; its compact form as well"


def lerobot(folder: Path, episodes: layouts.Episodes) -> Iterator[str]:
    library = module("lerobot.datasets.lerobot_dataset").LeRobotDataset
    axes = ["height", "width", "channels"]
    for kind, close in (("video", 4), ("image", 0)):
        features: Any = {
            "observation.images.top": {"dtype": kind, "shape": (SIZE, SIZE + 32, 3), "names": axes},
            "observation.state": {"dtype": "float32", "shape": (4,), "names": list("abcd")},
            "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        }
        root = folder / kind
        dataset = library.create("local/check", 10, features, root=root, use_videos=kind == "video")
        record(dataset, episodes)
        layout = assert_read(root, episodes, close=close)
        videos = sorted(root.rglob("*.mp4"))
        codec = f"{len(videos)} videos of {codec_of(videos[0])}" if videos else "embedded pictures"
        yield f"its {layout} with {codec} is read here"


def record(dataset: Any, episodes: layouts.Episodes) -> None:
    """Write episodes with either version of the library."""
    new = "finalize" in dir(dataset)
    for episode in episodes:
        rows = zip(episode["pixels"], episode["state"], episode["action"], strict=True)
        for pixels, state, action in rows:
            frame = {"observation.images.top": pixels, "observation.state": state, "action": action}
            dataset.add_frame(
                frame | {"task": "reach"} if new else frame, *([] if new else ["reach"])
            )
        dataset.save_episode()
    if new:
        dataset.finalize()


def module(name: str) -> Any:
    """Import a module of a library that may not be there."""
    return import_module(name)


def codec_of(path: Path) -> str:
    with av.open(str(path)) as container:
        return container.streams.video[0].codec_context.codec.canonical_name


CHECKS: dict[str, Callable[[Path, Sequence[Any]], Iterator[str]]] = {
    "stable-worldmodel": stable_worldmodel,
    "robomimic": robomimic,
    "d4rl": d4rl,
    "minari": minari,
    "ogbench": ogbench,
    "lerobot": lerobot,
}


if __name__ == "__main__":
    main()
