"""One module per command: its configuration and `run(config)`, the recipe, readable top to bottom.

`python plan.py ...` in a checkout and `jepa-world plan ...` anywhere are the same command.
"""

import errno
import importlib
import os
import signal
import sys
from pathlib import Path

from jepa_world.config import parse
from jepa_world.processes import launched
from jepa_world.registry import Stopped, UserError, did_you_mean

COMMANDS = {
    "collect": "Collect",
    "train_world_model": "TrainWorldModel",
    "train_cost": "TrainCost",
    "train_lejepa": "TrainLejepa",
    "train_ijepa": "TrainIjepa",
    "train_vjepa": "TrainVjepa",
    "plan": "Plan",
    "evaluate": "Evaluate",
    "probe": "Probe",
    "probe_video": "ProbeVideo",
    "probe_world_model": "ProbeWorldModel",
    "prepare_video": "PrepareVideo",
    "inspect": "Inspect",
    "convert": "Convert",
    "import_leworldmodel": "ImportLeworldmodel",
}


def main(command: str | None = None) -> None:
    """Run a command with this process's arguments; a user's mistake ends it in one line.

    Args:
        command: Its name; taken from the first argument if not given, as `jepa-world plan` does.
    """
    arguments = sys.argv[1:]
    try:
        if command is None:
            command, *arguments = arguments or ["--help"]
            command = _known(command)
        if command == "evaluate" and "--probe" in arguments:  # frozen features instead of planning
            arguments = [word for word in arguments if word != "--probe"]
            command = _probe_of(arguments)
        launched()
        module = importlib.import_module(f"jepa_world.commands.{command}")
        module.run(parse(vars(module)[COMMANDS[command]], arguments, program=command))
    except UserError as error:
        print(f"{command}:", *str(error).split(), file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as stop:
        print(f"{command}: {stop}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    except MemoryError:
        print(f"{command}: there is not enough memory for that", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print(f"{command}: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:  # of a disk, wherever something was written
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        print(f"{command}: cannot write {error.filename or 'a file'}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _known(command: str) -> str:
    """Return a command's name with underscores."""
    if command in ("-h", "--help"):
        print("usage: jepa-world {" + ",".join(COMMANDS) + "} [OPTIONS]; each has --help")
        raise SystemExit(0)
    name = command.replace("-", "_")
    if name not in COMMANDS:
        raise UserError(f"unknown command {command!r}{did_you_mean(name, list(COMMANDS))}")
    return name


def _probe_of(arguments: list[str]) -> str:
    """Return the probe that is meant: of latents where an env or a world model is named."""
    from jepa_world.checkpoint import find_checkpoint
    from jepa_world.config import read_yaml

    words = [part for word in arguments for part in word.split("=", 1)]
    if "--env" in words:
        return "probe_world_model"
    if "--checkpoint" in words[:-1]:
        path = Path(words[words.index("--checkpoint") + 1])
        if read_yaml(find_checkpoint(path) / "config.yaml").get("method") == "world_model":
            return "probe_world_model"
    return "probe"


def prepare_process() -> None:
    """Keep freed memory; use one torch thread, the fastest for small nets.

    OMP_NUM_THREADS, where it is set, says how many threads instead.
    """
    import torch

    from jepa_world.memory import keep_freed_memory

    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
