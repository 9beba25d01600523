"""Put a trained world model among those that come with the package, in a sixth of the bytes.

    python benchmarks/ship.py runs/maze0 maze    # jepa_world/checkpoints/maze
    python evaluate.py --env maze --episodes 100 # is it as good as what it was made from?

What only training needs is left out. Large matrices are in 4 bits, other weights in 8, what
is left in half precision (`checkpoint.in_few_bits`).
"""

import argparse
import tempfile
from pathlib import Path

import torch

from jepa_world.checkpoint import (
    find_checkpoint,
    in_few_bits,
    load_tensors,
    save_tensors,
    write_yaml,
)
from jepa_world.commands.plan import SHIPPED
from jepa_world.config import read_yaml
from jepa_world.methods.world_model import load_world_model
from jepa_world.registry import UserError


def ship(run: Path, name: str, bits: int = 4) -> Path:
    """Write the checkpoint of a run as the shipped one of an environment, and return its folder.

    Raises:
        UserError: no world model there, a number beyond float16, or one is shipped already.
    """
    source, target = find_checkpoint(run), SHIPPED / name
    model, _ = load_world_model(source)
    if target.exists():
        raise UserError(f"{target} is there: nothing is overwritten, remove it first")
    own = model.state_dict().keys()
    tensors, facts = load_tensors(source / "model.safetensors")
    small = in_few_bits({key: x for key, x in tensors.items() if key in own}, bits=bits)
    if not all(bool(x.isfinite().all()) for x in small.values()):
        raise UserError(f"{source} holds numbers beyond float16")
    with tempfile.TemporaryDirectory(dir=SHIPPED) as made:
        folder = Path(made) / name
        folder.mkdir()
        save_tensors(folder / "model.safetensors", small, facts)
        write_yaml(folder / "config.yaml", read_yaml(source / "config.yaml"))
        (folder / "model.safetensors").chmod(0o644)
        load_world_model(folder)
        return folder.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of large matrices")
    options = parser.parse_args()
    try:
        folder = ship(options.run, options.name, options.bits)
    except UserError as error:
        parser.error(str(error))
    size = (folder / "model.safetensors").stat().st_size
    print(f"{size / 1e6:.1f} MB in {folder}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
