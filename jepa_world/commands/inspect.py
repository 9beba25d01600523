"""Look at a dataset before training on it: its layout, columns, episodes, numbers and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jepa_world.config import require_at_least
from jepa_world.data.layouts import Table, reading
from jepa_world.data.trajectories import Columns, Trajectories, find_pixels, open_tables
from jepa_world.pictures import Strip, contact_sheet
from jepa_world.registry import UserError
from jepa_world.runs import Run


@dataclass(frozen=True)
class Inspect:
    """Show the columns, episodes and statistics of a dataset; draw frames of some episodes."""

    data: Path
    """Dataset, in one of the layouts of docs/datasets.md."""
    columns: Columns = Columns()
    """Which of its columns are the pictures and the actions."""
    episodes: int = 6
    """Episodes of the contact sheet, evenly spread."""
    frames: int = 8
    """Frames of each of them, evenly spread."""
    run_dir: Path | None = None
    """Where contact_sheet.png and results.json are left; default runs/inspect-<time>."""


def run(config: Inspect) -> None:
    """Print what is there; leave contact_sheet.png and results.json in the run folder."""
    require_at_least(config, episodes=1, frames=1)
    made = Run.of("inspect", config.run_dir)
    layout, tables = open_tables(config.data)
    lengths = np.concatenate([table.lengths for table in tables])
    numbers = {name: _statistics(tables, name) for name in tables[0].numbers}
    chosen = find_pixels(tables[0], config.columns.pixels)
    strips = _strips(tables, chosen, config)
    made.open(config)

    print(f"{config.data}: {layout}, {len(lengths)} episodes, {lengths.sum()} frames")
    print(
        f"an episode has {lengths.min()} to {lengths.max()} frames, median {np.median(lengths):g}"
    )
    for name, pictures in tables[0].pictures.items():
        print(f"{name}: pictures of {'x'.join(map(str, pictures.shape))}")
    print("\n".join(_lines(numbers)))
    print(_verdict(config))
    results = {
        "layout": layout,
        "episodes": len(lengths),
        "frames": int(lengths.sum()),
        "lengths": lengths.tolist(),
        "pictures": {name: list(found.shape) for name, found in tables[0].pictures.items()},
        "columns": numbers,
    }
    if strips:
        results["contact_sheet"] = {"column": chosen, **_colours(strips)}
        contact_sheet(strips).savefig(made.folder / "contact_sheet.png", dpi=120)
    made.finish(results)


def _statistics(tables: Sequence[Table], name: str) -> dict[str, Any]:
    """Return the kind of a column, and for numbers what is finite of every part of a row."""
    rows = np.concatenate([table.numbers[name]() for table in tables if name in table.numbers])
    kind = {"row": list(rows.shape[1:]), "type": str(rows.dtype)}
    if rows.dtype.kind not in "biuf":
        return kind
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    finite = np.isfinite(flat)
    counts = finite.sum(0).clip(1)
    kept = np.where(finite, flat, 0.0)
    mean = kept.sum(0) / counts
    variance = (np.where(finite, flat - mean, 0.0) ** 2).sum(0) / counts
    return kind | {
        "least": np.where(finite, flat, np.inf).min(0).tolist(),
        "mean": mean.tolist(),
        "most": np.where(finite, flat, -np.inf).max(0).tolist(),
        "std": np.sqrt(variance).tolist(),
        "rows_not_finite": int((~finite.all(1)).sum()),
    }


def _lines(numbers: dict[str, dict[str, Any]]) -> list[str]:
    """Lay out a line a column: of the parts of a row the least, mean, most, and mean std."""
    width = max(len(name) for name in ("column", *numbers))
    head = f"{'column':{width}}  {'row':>8}  {'type':>8}  {'least':>9}  {'mean':>9}  {'most':>9}"
    lines = [f"{head}  {'std':>9}  not finite"]
    for name, column in numbers.items():
        row = "x".join(map(str, column["row"])) or "1"
        line = f"{name:{width}}  {row:>8}  {column['type']:>8}"
        if "mean" in column:
            values = [min(column["least"]), np.mean(column["mean"]), max(column["most"])]
            values.append(np.mean(column["std"]))
            line += "".join(f"  {value:9.4g}" for value in values)
            line += f"  {column['rows_not_finite']:10d}"
        lines.append(line)
    return lines


def _verdict(config: Inspect) -> str:
    """Say which columns training would read, or why it would refuse the dataset."""
    named = config.columns
    try:
        data = Trajectories(config.data, pixels=named.pixels, action=named.action, cache_bytes=0)
    except UserError as error:
        return f"train_world_model would refuse it: {error}"
    left_out = f"; {data.skipped.summary()}" if data.skipped else ""
    return f"train_world_model reads {data.origin}{left_out}"


def _strips(tables: Sequence[Table], chosen: str | None, config: Inspect) -> list[Strip]:
    """Read evenly spread frames of evenly spread episodes; nothing without pictures."""
    if chosen not in tables[0].pictures:
        return []
    places = [(table, episode) for table in tables for episode in range(len(table.lengths))]
    strips: list[Strip] = []
    for number in _spread(len(places), config.episodes):
        table, episode = places[number]
        length = int(table.lengths[episode])
        first = int(table.lengths[:episode].sum())
        steps = _spread(length, config.frames)
        with reading(table.path):
            read = table.pictures[chosen].open()
            frames = [read(first + step, first + step + 1, 1)[0] for step in steps]
        strips.append(Strip(f"episode {number}\n{length} frames", steps, np.stack(frames)))
    return strips


def _spread(count: int, at_most: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, at_most)).round().astype(int).tolist()


def _colours(strips: Sequence[Strip]) -> dict[str, list[float]]:
    """Return mean and standard deviation of every channel of the frames that are drawn."""
    pixels = np.concatenate([strip.frames.reshape(-1, strip.frames.shape[-1]) for strip in strips])
    return {"mean": pixels.mean(0).tolist(), "std": pixels.std(0).tolist()}
