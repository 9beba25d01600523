"""`python plan.py --help`; an installed copy has `jepa-world plan`."""

from jepa_world.commands import main

if __name__ == "__main__":
    main("plan")
