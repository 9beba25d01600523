"""`python train_ijepa.py --help`; an installed copy has `jepa-world train_ijepa`."""

from jepa_world.commands import main

if __name__ == "__main__":
    main("train_ijepa")
