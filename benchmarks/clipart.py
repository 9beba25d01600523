"""Lay Debian's open clip art out as a data set: ten kinds of things, and all that is unlabelled.

    apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb clipart
    python benchmarks/clipart.py clipart/usr/share/openclipart/png data/clipart

OUT/ten has `train` and `test` folders of ten classes, every fifth drawing in `test`. OUT/all has
the same test part, and every drawing that is not in it in `train`: to learn from without labels.
Links, no copies; of drawings with the same bytes the first one counts.
"""

import argparse
import hashlib
from pathlib import Path

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


def link(paths: list[Path], folder: Path) -> None:
    """Link drawings into a folder, numbered: names repeat across subfolders."""
    folder.mkdir(parents=True)
    for number, path in enumerate(paths):
        (folder / f"{number:04d}_{path.name}").symlink_to(path.resolve())


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
    for kind, paths in kinds.items():
        test = paths[4::5] if kind in TEN else []
        train = [path for path in paths if path not in set(test)]
        link(train, options.out / "all" / "train" / kind)
        if kind in TEN:
            link(train, options.out / "ten" / "train" / kind)
            for split in ("ten", "all"):
                link(test, options.out / split / "test" / kind)
    things = sum(len(kinds[kind]) for kind in TEN)
    print(f"{things} drawings of ten kinds, {sum(map(len, kinds.values()))} in all")


if __name__ == "__main__":
    main()
