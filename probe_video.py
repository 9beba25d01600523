"""`python probe_video.py --help`; an installed copy has `jepa-world probe_video`."""

from jepa_world.commands import main

if __name__ == "__main__":
    main("probe_video")
