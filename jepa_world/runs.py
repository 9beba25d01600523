"""Run folders: every command leaves `config.yaml`, `results.json` and what it made in one."""

import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mujoco
import torch

import jepa_world
from jepa_world.checkpoint import write_json, write_yaml
from jepa_world.config import to_dict
from jepa_world.registry import UserError


@dataclass(frozen=True)
class Run:
    """A run folder, and the time its command has taken."""

    folder: Path
    began: float = field(default_factory=time.perf_counter)
    began_cpu: float = field(default_factory=time.process_time)

    @classmethod
    def of(cls, command: str, folder: Path | None) -> "Run":
        """Name the folder: the user's, or `runs/<command>-<time>`."""
        return cls(folder or Path(time.strftime(f"runs/{command}-%Y%m%d-%H%M%S")))

    def open(self, config: Any, *, resume: bool = False) -> None:
        """Make the folder and write the configuration, every value of it, as `config.yaml`.

        Raises:
            UserError: the folder holds a run already, cannot be written, or has none to resume.
        """
        name = repr(str(self.folder))
        if resume and not (self.folder / "config.yaml").is_file():
            raise UserError(f"nothing to resume in {name}: it holds no config.yaml")
        try:
            if not resume and any(_finished_files(self.folder)):
                raise UserError(
                    f"{name} is not empty: nothing is overwritten, name another --run-dir"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_yaml(self.folder / "config.yaml", to_dict(config))
        except OSError as error:
            raise UserError(f"cannot write the run folder {name}: {error.strerror}") from error

    def finish(self, results: dict[str, Any]) -> None:
        """Write `results.json`, with versions, device, time and memory, and say where it is."""
        facts = {
            "versions": {
                "jepa_world": jepa_world.__version__,
                "torch": torch.__version__,
                "mujoco": mujoco.__version__,
                "python": platform.python_version(),
            },
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "wall_seconds": round(time.perf_counter() - self.began, 1),
            "cpu_seconds": round(time.process_time() - self.began_cpu, 1),
        }
        if sys.platform != "win32":
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            facts["peak_memory_mb"] = peak // (1024 if sys.platform == "linux" else 1024**2)
        write_json(self.folder / "results.json", results | facts)
        print(f"everything this run made is in {self.folder}")


def _finished_files(folder: Path) -> list[Path]:
    """Return what is in a folder, but for what a kill left of a file that was being written."""
    found = folder.iterdir() if folder.exists() else ()
    return [path for path in found if path.suffix != ".unfinished"]
