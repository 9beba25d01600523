"""`python evaluate.py --help`; an installed copy has `jepa-world evaluate`."""

from jepa_world.commands import main

if __name__ == "__main__":
    main("evaluate")
