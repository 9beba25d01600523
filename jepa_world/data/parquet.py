"""LeRobot's folders, and Minari's Arrow and Parquet storage, as tables; they need pyarrow.

LeRobot v2.0 and v2.1 have a file of parquet and a video for every episode, v3.0 packs many into
one. Numbers lie in data/, cameras in videos/ or, as PNG, in the parquet; meta/ says what belongs to
which episode. Minari has a folder for every episode, with nested columns.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from jepa_world.config import read_json
from jepa_world.data.files import inside
from jepa_world.data.layouts import (
    Pictures,
    ReadFrames,
    Shape,
    Table,
    channels_last,
    decoded,
    open_videos,
    over_segments,
    picture_shape,
    reading,
    require,
)
from jepa_world.registry import UserError


@dataclass(frozen=True)
class _Episodes:
    """What the meta/ of LeRobot says of its episodes."""

    index: np.ndarray
    lengths: np.ndarray
    files: list[Path]
    """Of parquet, in the order of the rows."""
    rows: np.ndarray
    """Of every such file."""
    videos: Callable[[str], tuple[list[Path], np.ndarray]]
    """Of a camera: the video of every episode, and the second in it where the episode begins."""


def open_lerobot(path: Path) -> tuple[str, list[Table]]:
    """Open a folder of LeRobot, told by its meta/info.json."""
    file = path / "meta" / "info.json"
    info = read_json(file)
    require(file, ("codebase_version", "features", "fps", "data_path"), info)
    version = str(info["codebase_version"])
    if version not in _LEROBOT:
        known = ", ".join(_LEROBOT)
        raise UserError(f"{path} is LeRobot {version}; read are {known}: convert it with lerobot")
    with reading(file):
        return f"LeRobot {version}", [_lerobot_table(path, info, _LEROBOT[version](path, info))]


def _lerobot_table(path: Path, info: Mapping[str, Any], episodes: _Episodes) -> Table:
    if len(episodes.lengths) == 0:
        raise UserError(f"{path} has no episodes")
    given = _read_parquet(episodes.files, "episode_index", ())
    if not np.array_equal(given, np.repeat(episodes.index, episodes.lengths)):
        raise UserError(
            f"{path}: the rows of data/ ({len(given)}) are not those of the episodes in meta/ "
            f"({episodes.lengths.sum()})"
        )
    # The middle of a frame: where an episode begins in a video is a sum of rounded durations.
    times = _read_parquet(episodes.files, "timestamp", ()).astype(np.float64) + 0.5 / info["fps"]
    numbers: dict[str, Callable[[], np.ndarray]] = {}
    pictures: dict[str, Pictures] = {}
    for key, feature in info["features"].items():
        if feature["dtype"] == "video":
            opens = partial(open_videos, *episodes.videos(key), episodes.lengths, times)
            pictures[key] = Pictures(len(given), _feature_shape(feature), opens)
        elif feature["dtype"] == "image":
            opens = partial(_open_parquet_pictures, episodes.files, episodes.rows, key)
            pictures[key] = Pictures(len(given), _feature_shape(feature), opens)
        elif feature["dtype"] != "string":
            numbers[key] = partial(_read_parquet, episodes.files, key, tuple(feature["shape"]))
    return Table(path, episodes.lengths, numbers, pictures)


def _feature_shape(feature: Mapping[str, Any]) -> Shape:
    """Return the (h, w, c) of a camera, which names its axes in any order."""
    first, second, third = feature["shape"]
    names = feature.get("names")
    channels_first = isinstance(names, list) and str(names[0]).startswith("channel")
    return (second, third, first) if channels_first else (first, second, third)


def _lerobot_v2(path: Path, info: Mapping[str, Any]) -> _Episodes:
    """Read the episodes of v2.0 and v2.1: a file of parquet and a video each."""
    file = path / "meta" / "episodes.jsonl"
    with reading(file):
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        index = np.array([row["episode_index"] for row in rows], np.int64)
        lengths = np.array([row["length"] for row in rows], np.int64)

    def places(template: str, **names: str) -> list[Path]:
        chunks = (index // info["chunks_size"]).tolist()
        return [
            inside(path, template, episode_chunk=chunk, episode_index=episode, **names)
            for chunk, episode in zip(chunks, index.tolist(), strict=True)
        ]

    def videos(key: str) -> tuple[list[Path], np.ndarray]:
        return places(info["video_path"], video_key=key), np.zeros(len(index))

    return _Episodes(index, lengths, places(info["data_path"]), lengths, videos)


def _lerobot_v3(path: Path, info: Mapping[str, Any]) -> _Episodes:
    """Read the episodes of v3.0: many in a file of parquet, and in a video."""
    metas = sorted((path / "meta" / "episodes").glob("*/*.parquet"))
    if not metas:
        raise UserError(f"{path} has no meta/episodes/*/*.parquet, where LeRobot v3.0 has episodes")
    column = partial(_read_parquet, metas, row=())
    lengths = column("length")

    def places(template: str, key: str, **names: str) -> list[Path]:
        chunks, files = (column(f"{key}/{word}_index").tolist() for word in ("chunk", "file"))
        return [
            inside(path, template, chunk_index=chunk, file_index=file, **names)
            for chunk, file in zip(chunks, files, strict=True)
        ]

    def videos(key: str) -> tuple[list[Path], np.ndarray]:
        files = places(info["video_path"], f"videos/{key}", video_key=key)
        return files, column(f"videos/{key}/from_timestamp")

    owners = places(info["data_path"], "data")
    rows = {file: 0 for file in owners}
    for file, length in zip(owners, lengths.tolist(), strict=True):
        rows[file] += length
    counts = np.array(list(rows.values()))
    return _Episodes(column("episode_index"), lengths, list(rows), counts, videos)


_LEROBOT: dict[str, Callable[[Path, Mapping[str, Any]], _Episodes]] = {
    "v2.0": _lerobot_v2,
    "v2.1": _lerobot_v2,
    "v3.0": _lerobot_v3,
}


def open_minari_arrow(folder: Path) -> tuple[str, list[Table]]:
    """Open the Arrow or Parquet storage of Minari: a folder an episode, nested columns."""
    metadata = read_json(folder / "metadata.json")
    kind = metadata.get("data_format")
    if kind not in ("arrow", "parquet"):
        raise UserError(f"{folder} is Minari's {kind!r} storage, and main_data.hdf5 is not there")
    episodes = sorted(
        (p for p in folder.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name)
    )
    if not episodes:
        raise UserError(f"{folder} has no folder 0 of a first episode")
    with reading(folder):
        return f"Minari ({kind})", [_minari_table(folder, kind, metadata, episodes)]


def _minari_table(
    folder: Path, kind: str, metadata: Mapping[str, Any], episodes: list[Path]
) -> Table:
    lengths = np.array([len(_arrow_column(e, kind, "rewards")) for e in episodes])
    pyarrow = _pyarrow("pyarrow")
    numbers: dict[str, Callable[[], np.ndarray]] = {}
    pictures: dict[str, Pictures] = {}
    for key, values in _arrow_leaves(_arrow_table(episodes[0], kind).slice(0, 1)).items():
        row = _space_shape(metadata, key)
        if pyarrow.types.is_binary(values.type):
            shape = decoded(values[0].as_py()).shape
        else:
            one = _to_numpy(episodes[0], key, values, row)
            shape = picture_shape(one.shape[1:], one.dtype)
        if shape is None:
            numbers[key] = partial(_read_arrow, episodes, kind, key, row)
        else:
            opens = partial(_open_arrow, episodes, kind, key, row, lengths)
            pictures[key] = Pictures(int(lengths.sum()), shape, opens)
    return Table(folder, lengths, numbers, pictures)


def _space_shape(metadata: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """Return the shape of a row that Minari's spaces give, None where they give none."""
    name, *path = key.split("/")
    space = json.loads(metadata.get(f"{name.removesuffix('s')}_space") or "{}")
    for word in path:
        inner = space.get("subspaces", {})
        space = inner[int(word)] if isinstance(inner, list) else inner.get(word, {})
    return tuple(space["shape"]) if "shape" in space else None


def _arrow_table(episode: Path, kind: str, columns: list[str] | None = None) -> Any:
    pyarrow = _pyarrow("pyarrow")
    with reading(episode):
        if kind == "parquet":
            parquet = _pyarrow("pyarrow.parquet")
            files = map(parquet.ParquetFile, sorted(episode.glob("*.parquet")))
            tables = [file.read(columns=columns, use_threads=False) for file in files]
        else:
            maps = (pyarrow.memory_map(str(file)) for file in sorted(episode.glob("*.arrow")))
            tables = [_pyarrow("pyarrow.ipc").open_file(file).read_all() for file in maps]
        return pyarrow.concat_tables(tables)


def _arrow_column(episode: Path, kind: str, name: str) -> Any:
    table = _arrow_table(episode, kind, [name])
    require(episode, [name], table.column_names)
    return _whole(table[name])


def _arrow_leaves(table: Any) -> dict[str, Any]:
    """Return the columns of a table by their paths, those inside structures as well."""
    types = _pyarrow("pyarrow").types
    waiting = {name: _whole(table[name]) for name in table.column_names}
    leaves: dict[str, Any] = {}
    while waiting:
        key, values = waiting.popitem()
        if types.is_struct(values.type):
            inner = [values.type.field(i).name for i in range(values.type.num_fields)]
            waiting |= {f"{key}/{name}": values.field(name) for name in inner}
        else:
            leaves[key] = values
    return dict(sorted(leaves.items()))


def _arrow_leaf(episode: Path, kind: str, key: str) -> Any:
    name, *path = key.split("/")
    values = _arrow_column(episode, kind, name)
    with reading(episode):
        for word in path:
            values = values.field(word)
    return values


def _read_arrow(
    episodes: Sequence[Path], kind: str, key: str, row: tuple[int, ...] | None
) -> np.ndarray:
    return np.concatenate([_to_numpy(e, key, _arrow_leaf(e, kind, key), row) for e in episodes])


def _open_arrow(
    episodes: Sequence[Path], kind: str, key: str, row: tuple[int, ...] | None, lengths: np.ndarray
) -> ReadFrames:
    binary = _pyarrow("pyarrow").types.is_binary

    def read(episode: int, first: int, last: int, step: int) -> np.ndarray:
        values = _arrow_leaf(episodes[episode], kind, key)[first:last:step]
        if binary(values.type):
            return np.stack([decoded(data) for data in values.to_pylist()])
        pictures = _to_numpy(episodes[episode], key, values, row)
        return channels_last(pictures, pictures.shape[1:])

    return over_segments(lengths, read)


def _read_parquet(files: Sequence[Path], name: str, row: tuple[int, ...]) -> np.ndarray:
    """Return the rows of a column of numbers, each of the shape `row`."""
    parts: list[np.ndarray] = []
    for file in files:
        with reading(file):
            table = _parquet_file(file, name).read(columns=[name], use_threads=False)
            parts.append(_to_numpy(file, name, _whole(table[name]), row))
    return np.concatenate(parts)


def _open_parquet_pictures(files: Sequence[Path], rows: np.ndarray, name: str) -> ReadFrames:
    """Return a reader of pictures that lie as PNG or JPEG in files of parquet."""

    def read(segment: int, first: int, last: int, step: int) -> np.ndarray:
        file = _parquet_file(files[segment], name)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        begin, end = np.searchsorted(ends, [first, last - 1], side="right")
        groups = list(range(begin, end + 1))
        column = _whole(file.read_row_groups(groups, columns=[name], use_threads=False)[name])
        skipped = int(ends[begin] - sizes[begin])
        wanted = column[first - skipped : last - skipped : step].field("bytes").to_pylist()
        if None in wanted:
            raise UserError(f"{files[segment]}: pictures of {name!r} are names of files, not bytes")
        return np.stack([decoded(data) for data in wanted])

    return over_segments(rows, read)


def _parquet_file(file: Path, name: str) -> Any:
    opened = _pyarrow("pyarrow.parquet").ParquetFile(file)
    require(file, [name], opened.schema_arrow.names)
    return opened


def _whole(column: Any) -> Any:
    """Return a column as one array of plain Arrow types."""
    values = column.combine_chunks()
    return values.storage if isinstance(values, _pyarrow("pyarrow").ExtensionArray) else values


def _to_numpy(path: Path, name: str, values: Any, row: tuple[int, ...] | None) -> np.ndarray:
    """Return numbers, or lists of them at any depth, as rows of one shape."""
    types, count = _pyarrow("pyarrow").types, len(values)
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    while any(is_list(values.type) for is_list in lists):
        values = values.flatten()
    if row is None:
        row = () if len(values) == count else (len(values) // max(count, 1),)
    if len(values) != count * int(np.prod(row)):
        raise UserError(f"{path}: rows of {name!r} are not all of the shape {row}")
    return values.to_numpy(zero_copy_only=False).reshape(count, *row)


def _pyarrow(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            "this dataset holds Parquet or Arrow: pip install 'jepa-world[parquet]'"
        ) from error
