"""Write small datasets in the layouts of others, as their documentation describes them.

The tests read them, and `data_loading.py` measures how fast. An episode is columns with one row for
every frame: `pixels` (bytes, h x w x 3), `action` (the last row leads nowhere) and `state`.
`real_layouts.py` compares with what the libraries themselves write and read.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
from PIL import Image

from jepa_world.data.video import write_video

Episodes = Sequence[Mapping[str, np.ndarray]]
FPS = 10


def write_leworldmodel(path: Path, episodes: Episodes) -> Path:
    """Write whole columns, one frame a chunk; the action at a last frame is NaN."""
    actions = [without_last(episode["action"], np.nan) for episode in episodes]
    with h5py.File(path, "w") as file:
        pixels = joined(episodes, "pixels")
        file.create_dataset("pixels", data=pixels, chunks=(1, *pixels.shape[1:]))
        file["action"], file["state"] = np.concatenate(actions), joined(episodes, "state")
        file["ep_len"] = lengths(episodes).astype(np.int32)
        file["ep_offset"] = np.cumsum(lengths(episodes)) - lengths(episodes)
    return path


def write_robomimic(path: Path, episodes: Episodes) -> Path:
    """Write a group a demonstration, with two cameras."""
    with h5py.File(path, "w") as file:
        for number, episode in enumerate(episodes):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = len(episode["action"])
            demo["actions"], demo["states"] = episode["action"], episode["state"]
            demo["rewards"] = np.zeros(len(episode["action"]))
            demo["dones"] = np.arange(len(episode["action"])) == len(episode["action"]) - 1
            demo["obs/agentview_image"] = episode["pixels"]
            demo["obs/robot0_eye_in_hand_image"] = episode["pixels"][:, ::-1]
            demo["obs/robot0_joint_pos"] = episode["state"]
            demo["next_obs/agentview_image"] = episode["pixels"]
        data: Any = file["data"]
        data.attrs["total"] = int(lengths(episodes).sum())
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {}})
        file["mask/train"] = np.array([b"demo_0"])
    return path


def write_d4rl(path: Path, episodes: Episodes) -> Path:
    """Write arrays of all steps; the first episode ends by a terminal state, others by time."""
    last = np.concatenate([np.arange(n) == n - 1 for n in lengths(episodes)])
    terminal = last & (np.arange(len(last)) < lengths(episodes)[0])
    with h5py.File(path, "w") as file:
        pixels = joined(episodes, "pixels")
        file.create_dataset("observations", data=pixels, chunks=(1, *pixels.shape[1:]))
        file["actions"], file["infos/qpos"] = joined(episodes, "action"), joined(episodes, "state")
        file["rewards"] = np.zeros(len(last), np.float32)
        file["terminals"], file["timeouts"] = terminal, last & ~terminal
        file["metadata/algorithm"] = "SAC"
    return path


def write_minari(path: Path, episodes: Episodes, *, jpeg: bool = False) -> Path:
    """Write a folder of Minari in HDF5: an observation more than actions in every episode."""
    (path / "data").mkdir(parents=True)
    with h5py.File(path / "data" / "main_data.hdf5", "w", track_order=True) as file:
        for number, episode in enumerate(episodes):
            group = file.create_group(f"episode_{number}")
            steps = len(episode["action"]) - 1
            group.attrs["id"], group.attrs["total_steps"] = number, steps
            pixels: Any = episode["pixels"]
            if jpeg:
                encoded = np.empty(len(pixels), object)
                encoded[:] = [np.frombuffer(as_jpeg(frame), np.uint8) for frame in pixels]
                dtype = h5py.vlen_dtype(np.uint8)
                group.create_dataset("observations/pixels", data=encoded, dtype=dtype)
            else:
                group["observations/pixels"] = pixels
            group["observations/state"] = episode["state"]
            group["actions"], group["rewards"] = episode["action"][:-1], np.zeros(steps)
            group["terminations"] = np.arange(steps) == steps - 1
            group["truncations"] = np.zeros(steps, bool)
    write_minari_metadata(path, episodes, "hdf5", jpeg)
    return path


def write_minari_arrow(path: Path, episodes: Episodes, *, kind: str = "arrow") -> Path:
    """Write a folder of Minari in Arrow or Parquet: nested columns, frames as JPEG."""
    pa: Any = import_module("pyarrow")
    for number, episode in enumerate(episodes):
        count = len(episode["action"])
        jpegs = pa.array([as_jpeg(frame) for frame in episode["pixels"]], pa.binary())
        inner = {"pixels": jpegs, "state": rows_of_lists(episode["state"])}
        columns = {
            "observations": pa.StructArray.from_arrays(list(inner.values()), names=list(inner)),
            "actions": rows_of_lists(without_last(episode["action"], 0)),
            "rewards": pa.array(np.zeros(count)),
            "terminations": pa.array(np.arange(count) == count - 2),
            "truncations": pa.array(np.zeros(count, bool)),
        }
        folder = path / "data" / str(number)
        import_module("pyarrow.dataset").write_dataset(pa.table(columns), folder, format=kind)
        (folder / "metadata.json").write_text(json.dumps({"id": number, "total_steps": count - 1}))
    write_minari_metadata(path, episodes, kind, True)
    return path


def write_minari_metadata(path: Path, episodes: Episodes, kind: str, jpeg: bool) -> None:
    def box(rows: np.ndarray, low: float, high: float) -> dict[str, Any]:
        shape = rows.shape[1:]
        bounds = {"low": np.full(shape, low).tolist(), "high": np.full(shape, high).tolist()}
        return {"type": "Box", "dtype": str(rows.dtype), "shape": list(shape), **bounds}

    first = episodes[0]
    spaces = {"pixels": box(first["pixels"], 0, 255), "state": box(first["state"], -9, 9)}
    metadata = {
        "total_episodes": len(episodes),
        "total_steps": int(lengths(episodes).sum()) - len(episodes),
        "data_format": kind,
        "jpeg_encoding": jpeg,
        "observation_space": json.dumps({"type": "Dict", "subspaces": spaces}),
        "action_space": json.dumps(box(first["action"], -1, 1)),
    }
    (path / "data" / "metadata.json").write_text(json.dumps(metadata))


def write_ogbench(path: Path, episodes: Episodes, *, compressed: bool = True) -> Path:
    """Write the arrays of OGBench: the last action of an episode leads nowhere."""
    arrays: dict[str, Any] = {
        "observations": joined(episodes, "pixels"),
        "actions": joined(episodes, "action"),
        "terminals": np.concatenate([np.arange(n) == n - 1 for n in lengths(episodes)]),
        "qpos": joined(episodes, "state"),
    }
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def write_videos(path: Path, episodes: Episodes) -> Path:
    """Write a video and an .npz an episode, an action fewer than frames."""
    path.mkdir(parents=True, exist_ok=True)
    for number, episode in enumerate(episodes):
        write_video(path / f"{number:06d}.mp4", episode["pixels"], FPS)
        columns: dict[str, Any] = {"action": episode["action"][:-1], "state": episode["state"]}
        np.savez(path / f"{number:06d}.npz", **columns)
    return path


def write_lerobot_v2(
    path: Path, episodes: Episodes, *, codec: str = "libx264", embedded: bool = False
) -> Path:
    """Write LeRobot v2.1: a file of parquet and a video for every episode."""
    info = lerobot_info("v2.1", episodes, embedded)
    (path / "meta").mkdir(parents=True)
    (path / "meta" / "info.json").write_text(json.dumps(info))
    metas = [
        {"episode_index": number, "tasks": ["reach"], "length": len(episode["action"])}
        for number, episode in enumerate(episodes)
    ]
    (path / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, metas)) + "\n")
    (path / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "reach"}\n')
    for number, episode in enumerate(episodes):
        names = {"episode_chunk": 0, "episode_index": number}
        file = path / info["data_path"].format(**names)
        write_parquet(lerobot_table(episodes, [number], embedded), file)
        if not embedded:
            video = path / info["video_path"].format(video_key=CAMERA, **names)
            encode(video, episode["pixels"], codec)
    return path


def write_lerobot_v3(
    path: Path, episodes: Episodes, *, codec: str = "libx264", embedded: bool = False
) -> Path:
    """Write LeRobot v3.0: two episodes in a file of parquet, and in a video."""
    pa: Any = import_module("pyarrow")
    info = lerobot_info("v3.0", episodes, embedded)
    (path / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (path / "meta" / "info.json").write_text(json.dumps(info))
    metas: list[dict[str, Any]] = []
    row = 0
    for first in range(0, len(episodes), 2):
        numbers = range(first, min(first + 2, len(episodes)))
        names = {"chunk_index": 0, "file_index": first // 2}
        file = path / info["data_path"].format(**names)
        write_parquet(lerobot_table(episodes, numbers, embedded), file)
        begin = 0.0
        for number in numbers:
            count = len(episodes[number]["action"])
            meta = {"episode_index": number, "tasks": ["reach"], "length": count}
            meta |= {f"data/{key}": value for key, value in names.items()}
            meta |= {"dataset_from_index": row, "dataset_to_index": row + count}
            if not embedded:
                meta |= {f"videos/{CAMERA}/{key}": value for key, value in names.items()}
                meta |= {
                    f"videos/{CAMERA}/from_timestamp": begin,
                    f"videos/{CAMERA}/to_timestamp": begin + count / FPS,
                }
            metas.append(meta)
            row, begin = row + count, begin + count / FPS
        if not embedded:
            video = path / info["video_path"].format(video_key=CAMERA, **names)
            encode(video, np.concatenate([episodes[n]["pixels"] for n in numbers]), codec)
    table = pa.Table.from_pylist(metas)
    write_parquet(table, path / "meta/episodes/chunk-000/file-000.parquet")
    return path


CAMERA = "observation.images.top"
_PATHS = {
    "v2.1": (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
    "v3.0": (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
}


def lerobot_info(version: str, episodes: Episodes, embedded: bool) -> dict[str, Any]:
    first = episodes[0]
    single = {"dtype": "int64", "shape": [1], "names": None}
    axes = ["height", "width", "channels"]
    kind = "image" if embedded else "video"
    features = {
        CAMERA: {"dtype": kind, "shape": list(first["pixels"].shape[1:]), "names": axes},
        "observation.state": {"dtype": "float32", "shape": [first["state"].shape[1]]},
        "action": {"dtype": "float32", "shape": [first["action"].shape[1]], "names": None},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{name: single for name in ("frame_index", "episode_index", "index", "task_index")},
    }
    data_path, video_path = _PATHS[version]
    return {
        "codebase_version": version,
        "robot_type": "arm",
        "total_episodes": len(episodes),
        "total_frames": int(lengths(episodes).sum()),
        "chunks_size": 1000,
        "fps": FPS,
        "data_path": data_path,
        "video_path": None if embedded else video_path,
        "features": features,
    }


def lerobot_table(episodes: Episodes, numbers: Sequence[int], embedded: bool) -> Any:
    pa: Any = import_module("pyarrow")
    tables: list[Any] = []
    for number in numbers:
        episode = episodes[number]
        frame = np.arange(len(episode["action"]))
        first = int(lengths(episodes)[:number].sum())
        columns = {
            "observation.state": pa.array(list(episode["state"].astype(np.float32))),
            "action": pa.array(list(episode["action"].astype(np.float32))),
            "timestamp": pa.array((frame / FPS).astype(np.float32)),
            "frame_index": pa.array(frame),
            "episode_index": pa.array(np.full_like(frame, number)),
            "index": pa.array(first + frame),
            "task_index": pa.array(np.zeros_like(frame)),
        }
        if embedded:
            pictures = [{"bytes": as_png(p), "path": None} for p in episode["pixels"]]
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            columns[CAMERA] = pa.array(pictures, kind)
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def write_parquet(table: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    import_module("pyarrow.parquet").write_table(table, path)


def encode(path: Path, frames: np.ndarray, codec: str) -> None:
    """Write a video as LeRobot does: a key frame every two frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=FPS, options={"g": "2", "crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def as_jpeg(frame: np.ndarray) -> bytes:
    return as_file(frame, "JPEG", quality=95, subsampling=0)


def as_png(frame: np.ndarray) -> bytes:
    return as_file(frame, "PNG")


def as_file(frame: np.ndarray, kind: str, **options: int) -> bytes:
    memory = io.BytesIO()
    Image.fromarray(frame).save(memory, kind, **options)
    return memory.getvalue()


def rows_of_lists(rows: np.ndarray) -> Any:
    pa: Any = import_module("pyarrow")
    kind = pa.list_(pa.from_numpy_dtype(rows.dtype), rows.shape[1])
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), type=kind)


def joined(episodes: Episodes, name: str) -> np.ndarray:
    return np.concatenate([episode[name] for episode in episodes])


def lengths(episodes: Episodes) -> np.ndarray:
    return np.array([len(episode["action"]) for episode in episodes], np.int64)


def without_last(action: np.ndarray, value: float) -> np.ndarray:
    return np.concatenate([action[:-1], np.full_like(action[-1:], value)])


Write = Callable[[Path, Episodes], Path]
PLAIN: dict[str, tuple[str, Write]] = {
    "LeWorldModel": ("lewm.h5", write_leworldmodel),
    "robomimic": ("demo.hdf5", write_robomimic),
    "D4RL": ("d4rl.hdf5", write_d4rl),
    "Minari": ("minari", write_minari),
    "OGBench": ("ogbench.npz", write_ogbench),
    "videos": ("videos", write_videos),
}
"""Layouts that need no library beyond the core: a name of a file or folder, and what writes it."""
ARROW: dict[str, tuple[str, Write]] = {
    "LeRobot v2.1": ("lerobot2", write_lerobot_v2),
    "LeRobot v3.0": ("lerobot3", write_lerobot_v3),
    "Minari (arrow)": ("minari_arrow", write_minari_arrow),
}
"""Layouts that need pyarrow."""
