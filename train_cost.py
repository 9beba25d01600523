"""`python train_cost.py --help`; an installed copy has `jepa-world train_cost`."""

from jepa_world.commands import main

if __name__ == "__main__":
    main("train_cost")
