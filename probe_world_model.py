"""`python probe_world_model.py --help`; an installed copy has `jepa-world probe_world_model`."""

from jepa_world.commands import main

if __name__ == "__main__":
    main("probe_world_model")
