"""`python collect.py --help`; an installed copy has `jepa-world collect`."""

from jepa_world.commands import main

if __name__ == "__main__":
    main("collect")
