"""`python train_lejepa.py --help`; an installed copy has `jepa-world train_lejepa`."""

from jepa_world.commands import main

if __name__ == "__main__":
    main("train_lejepa")
