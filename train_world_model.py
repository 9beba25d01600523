"""`python train_world_model.py --help`; an installed copy has `jepa-world train_world_model`."""

from jepa_world.commands import main

if __name__ == "__main__":
    main("train_world_model")
