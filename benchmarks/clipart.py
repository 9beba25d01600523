"""Lay Debian's open clip art out as a data set: ten kinds of things, and all that is unlabelled.

    apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb clipart
    python benchmarks/clipart.py clipart/usr/share/openclipart/png data/clipart

OUT/ten has `train` and `test` folders of ten classes, every fifth drawing in `test`. OUT/all has
the same test part, and every drawing that is not in it in `train`: to learn from without labels.
Copies whose shorter side is at most 256 pixels, so that reading them takes seconds; of drawings
with the same bytes the first one counts, and one that PIL refuses is named and left out.
"""

import argparse
import hashlib
import shutil
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

SIDE = 256

TEN = (
    *("animals", "buildings", "food", "geography", "office"),
    *("people", "plants", "recreation", "tools", "transportation"),
)


def drawings(folder: Path) -> dict[str, list[Path]]:
    """Return the drawings below every folder of the collection, each content once."""
    seen: set[str] = set()
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*/**/*.png")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            kinds.setdefault(path.relative_to(folder).parts[0], []).append(path)
    return kinds


def shrink(path: Path, folder: Path) -> Path | None:
    """Write a drawing, scaled down to a shorter side of `SIDE` pixels, under its digest's name."""
    copy = folder / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.png"
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        with Image.open(path) as image:
            if (scale := SIDE / min(image.size)) >= 1:
                return Path(shutil.copy(path, copy))
            size = [max(SIDE, round(side * scale)) for side in image.size]
            image.convert("RGBA").resize(size, Image.Resampling.BOX).save(copy, compress_level=1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        print(f"left out: {path}: {error}", file=sys.stderr)
        return None
    return copy


def link(paths: list[tuple[str, Path]], folder: Path) -> None:
    """Link copies into a folder, numbered: names repeat across subfolders."""
    folder.mkdir(parents=True)
    for number, (name, copy) in enumerate(paths):
        (folder / f"{number:04d}_{name}").symlink_to(copy.resolve())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    kinds = drawings(options.source)
    if missing := sorted(set(TEN) - kinds.keys()):
        parser.error(f"{options.source} has no folders {', '.join(missing)}")
    if options.out.exists():
        parser.error(f"{options.out} is there already: nothing is overwritten")
    copies = options.out / "drawings"
    copies.mkdir(parents=True)
    flat = [path for paths in kinds.values() for path in paths]
    with ProcessPoolExecutor() as pool:
        copied = dict(zip(flat, pool.map(partial(shrink, folder=copies), flat), strict=True))
    for kind, paths in kinds.items():
        drawn = [(path.name, copy) for path in paths if (copy := copied[path])]
        test = drawn[4::5] if kind in TEN else []
        train = [one for one in drawn if one not in set(test)]
        link(train, options.out / "all" / "train" / kind)
        if kind in TEN:
            link(train, options.out / "ten" / "train" / kind)
            for split in ("ten", "all"):
                link(test, options.out / split / "test" / kind)
    things = sum(len(kinds[kind]) for kind in TEN)
    print(f"{things} drawings of ten kinds, {sum(map(len, kinds.values()))} in all")


if __name__ == "__main__":
    main()
