"""`python probe.py --help`; an installed copy has `jepa-world probe`."""

from jepa_world.commands import main

if __name__ == "__main__":
    main("probe")
