"""`python train_vjepa.py --help`; an installed copy has `jepa-world train_vjepa`."""

from jepa_world.commands import main

if __name__ == "__main__":
    main("train_vjepa")
