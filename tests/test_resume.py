"""Runs that are killed, or have two processes: a server imports once and forks all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


STAGED = (*COMMANDS[3:5], ("train_vjepa", "--clips.stages", 0.5, 2, 32))


def label(words):
    return " ".join(map(str, words))


SERVER = """
import gc, json, os, random, shutil, signal, socket, sys, threading, time, traceback
from functools import partial
from pathlib import Path
import torch
from accelerate.state import AcceleratorState
from torch import nn
from tqdm import tqdm
from jepa_world.checkpoint import load_tensors
from jepa_world.commands import main
from jepa_world.commands import train_cost, train_ijepa, train_lejepa, train_vjepa
from jepa_world.commands import train_world_model
from jepa_world.encoders import conv, resnet, vit
from jepa_world.memory import sharded
from jepa_world.methods.temporal_distance import TemporalDistanceLearning
from jepa_world.methods.vjepa2_ac import VJEPA2AC
from jepa_world.methods.world_model import Output, TeacherWorldModel, WorldModel
from jepa_world.objectives import TemporalDistance
from jepa_world.predictors import adaln, block_causal, masked, mlp, prefix
from jepa_world.runs import Run
from jepa_world.sigreg import SIGReg
from jepa_world.training import Loop, Training, begin, make_accelerator, train

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}  # files, as audit events


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.fit, self.dropout = nn.Linear(1, 1), nn.Dropout(0.5)

    def forward(self, batch, step):
        loss = (self.fit(self.dropout(batch["x"])) - 2 * batch["x"]).square().mean()
        return Output(loss, {}, torch.randn(8, 2))


def line(folder, resume, dropout=0.5, bad=(), shard=False):
    '''Train a line for six steps, two checkpoints and the best kept; some numbers are NaN.'''
    loop = Loop(keep=2, best=("error", "min"), shard=shard)
    config = Training(
        steps=6, batch_size=4, lr=0.1, log_every=1, checkpoint_every=1, loop=loop, resume=resume
    )
    torch.manual_seed(0)
    made, method = Run(folder), Line()
    accelerator = make_accelerator("no", "none", folder)
    begin(made, config, {"method": "line"}, 12, accelerator)
    numbers = torch.linspace(-1, 1, 12)[:, None]
    numbers[list(bad)], method.dropout.p = torch.nan, dropout
    train(
        *(method, lambda index, step: {"x": numbers[index]}, 12, config),
        accelerator=accelerator,
        run_dir=folder,
        evaluate=lambda: {"error": (method.fit.weight - 2).abs().item()},
    )


def forked(work, folder, change=None):
    '''Start work in a process of its own; with `change`, it kills itself before that one.'''
    pid = os.fork()
    if pid:
        return pid
    log = os.open(folder.parent / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    left = [change]

    def count(event, details):
        if event not in CHANGES or not str(details[0]).startswith(str(folder)):
            return
        if event == "open" and not details[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if change is not None:
        sys.addaudithook(count)
    code = 1
    try:
        work(folder, (folder / "config.yaml").is_file())
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def ended(pid):
    '''Wait, and return the exit code; a negative one is a signal.'''
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(work, folder):
    code = ended(forked(work, folder))
    assert code == 0, (folder.parent / "log").read_text()


def contents(folder):
    '''Return what must be equal: all but the timings of results.json and what it draws.'''
    files = [folder / "metrics.jsonl", *folder.rglob("*.safetensors"), *folder.rglob("*.yaml")]
    left = [p for p in folder.rglob("*") if p.suffix == ".unfinished" or p.name[:4] == ".tmp"]
    assert not left, left
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def at_every_change(folder, every):
    '''Kill before every n-th change of a file; return how many kills there were.'''
    kills, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        run = folder / f"killed{kills}"
        code = ended(forked(line, run, kills * every))
        finish(line, run)
        same(run, folder / "straight")
        kills += 1
    return kills - 1


def at_random(folder, words, kills):
    '''Kill at random moments, again after every resume; return how many met a file half written.'''
    def work(run, resume):
        sys.argv = [*words, "--run-dir", str(run), *(["--resume"] if resume else [])]
        main(words[0])

    began = time.perf_counter()
    finish(work, folder / "whole")
    lasts, moments = time.perf_counter() - began, random.Random(0)
    done = halves = runs = 0
    while done < kills:
        run, code = folder / f"killed{runs}", None
        while code != 0 and done < kills:
            pid = forked(work, run)
            time.sleep(moments.uniform(0, lasts))
            os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            assert code in (0, -signal.SIGKILL), (folder / "log").read_text()
            done += code != 0
            halves += any(p.suffix == ".unfinished" or p.name[:4] == ".tmp"
                          for p in run.rglob("*"))
        finish(work, run)
        same(run, folder / "whole")
        runs += 1
    return halves


def side_by_side(folder, words):
    '''Train on one process and on two, in float64; return the largest difference.'''
    def work(run, resume, **launched):
        os.environ |= launched
        torch.set_default_dtype(torch.float64)
        sys.argv = [*words, "--run-dir", str(run)]
        main(words[0])

    finish(work, folder / "one")
    two_of(work, folder / "two")
    assert "2 process(es) on cpu" in (folder / "log").read_text()
    one, two = (load_tensors(folder / name / "checkpoint" / "model.safetensors")[0]
                for name in ("one", "two"))
    assert any(value.dtype == torch.float64 for value in one.values())
    return max(float((two[key] - value).abs().max()) for key, value in one.items())


def in_shards(folder, words):
    '''Train on one process, and sharded on two; return the largest difference, in float64.

    From a checkpoint in the middle, two go on to the same bytes, and one to the same weights.
    '''
    def work(run, resume, *more, **launched):
        os.environ |= launched
        torch.set_default_dtype(torch.float64)
        sys.argv = [*words, "--run-dir", str(run), *(["--resume"] if resume else []), *more]
        main(words[0])

    def in_parts(run, resume, **launched):
        work(run, resume, "--loop.shard", **launched)

    finish(work, folder / "one")
    two_of(in_parts, folder / "two")
    for name in ("again", "alone"):
        shutil.copytree(folder / "two", folder / name)
        shutil.rmtree(folder / name / "checkpoint")
        (folder / name / "checkpoints" / "step-00000002").rename(folder / name / "checkpoint")
    two_of(in_parts, folder / "again")
    finish(work, folder / "alone")
    one, two, again, alone = (load_tensors(folder / n / "checkpoint" / "training.safetensors")[0]
                              for n in ("one", "two", "again", "alone"))
    assert all(torch.equal(again[key], value) for key, value in two.items())
    assert one.keys() == two.keys() == alone.keys()
    return max(float((other[key] - value).abs().max())
               for key, value in one.items() for other in (two, alone))


def methods():
    '''Return a function that makes each method which takes windows or frames of an episode.'''
    def world(predictor, **options):
        return WorldModel(encoder(), predictor(16, 2, **options), SIGReg(slices=8), weight=0.1)

    def encoder():
        return vit.ViTEncoder((1, 3, 16, 16), dim=16, depth=2, heads=2)

    blocks = {"width": 16, "depth": 2, "heads": 2}
    pooled = partial(vit.PooledViTEncoder, (1, 3, 16, 16), dim=8, depth=1, heads=2)
    network = mlp.MLPPredictor
    return {
        "mlp": lambda: WorldModel(pooled(), network(8, 2), SIGReg(slices=8), weight=0.1),
        "rollout": lambda: world(adaln.AdaLNPredictor, **blocks),
        "extend": lambda: world(block_causal.BlockCausalPredictor, rows=2, **blocks),
        "prefixes": lambda: world(prefix.PrefixPredictor, **blocks),
        "teacher": lambda: TeacherWorldModel(pooled(), network(8, 2)),
        "frozen": lambda: VJEPA2AC(encoder(), adaln.AdaLNPredictor(16, 2, **blocks)),
        "cost": lambda: TemporalDistanceLearning(
            WorldModel(pooled(), network(8, 2)), TemporalDistance(8, 1, width=16)
        ),
    }


def shards_of(folder):
    '''Train every method on one process, and sharded on two; return the largest difference.'''
    def work(run, resume, shard=False, recompute=False, **launched):
        os.environ |= launched
        torch.set_default_dtype(torch.float64)
        random = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        method = methods()[run.parent.name]()
        batch = {
            "pixels": torch.randint(256, (24, 4, 16, 16, 3), dtype=torch.uint8, generator=random),
            "action": torch.rand(24, 4, 2, generator=random),
            "reached": torch.rand(24, 2, generator=random) < 0.3,
        }
        loop = Loop(shard=shard, recompute=recompute, accumulate=2)
        train(
            *(method, lambda index, step: {k: x[index] for k, x in batch.items()}, 24),
            Training(steps=5, batch_size=8, lr=1e-2, log_every=1, loop=loop),
            accelerator=make_accelerator("no", "none", run, accumulate=2),
            run_dir=run,
        )
        found = any("gloo" in p.read_text() for p in Path("/proc/self/task").glob("*/comm"))
        assert not found, "a thread may meet the interpreter in its end"

    worst = 0.0
    for name in methods():
        (folder / name).mkdir()
        finish(work, folder / name / "one")
        two_of(partial(work, shard=True), folder / name / "two")
        if name in ("rollout", "extend"):
            two_of(partial(work, shard=True, recompute=True), folder / name / "again")
        one, *others = (load_tensors(p)[0] for n in ("one", "two", "again")
                        if (p := folder / name / n / "checkpoint/training.safetensors").is_file())
        assert others and all(other.keys() == one.keys() for other in others)
        off = max(float((o[key] - x).abs().max()) for o in others for key, x in one.items())
        worst = max(worst, off)
        assert "sharded over 2 processes" in (folder / name / "log").read_text()
    two_of(holds_half, folder / "half")
    return worst


def holds_half(run, resume, **launched):
    '''Shard a model: this process has half of it, before a forward pass and behind it.'''
    os.environ |= launched
    accelerator = make_accelerator("no", "none", run)
    method = methods()["rollout"]()
    half = sharded(method, accelerator.device)
    for _ in range(2):
        held = sum(p.to_local().numel() for p in half.parameters())
        assert held <= 0.52 * sum(p.numel() for p in method.parameters()), held
        half.encoder(torch.rand(2, 1, 3, 16, 16))


def two_of(work, folder):
    '''Run work in two processes, with what torchrun would give them.'''
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rest = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pids = [forked(partial(work, RANK=str(n), LOCAL_RANK=str(n), **rest), folder)
            for n in range(2)]
    assert [ended(pid) for pid in pids] == [0, 0], (folder.parent / "log").read_text()


def skipped(folder, shard):
    '''Train with a number that is NaN in one of two processes; return the steps skipped.'''
    def work(run, resume, **launched):
        os.environ |= launched
        line(run, resume, dropout=0.0, bad=[3], shard=shard)

    finish(work, folder / "one")
    two_of(work, folder / "two")
    assert load_tensors(folder / "two/checkpoint/training.safetensors")[1]["processes"] == 2
    read = [json.loads((folder / n / "metrics.jsonl").read_text().splitlines()[-1])
            for n in ("one", "two")]
    assert read[0]["skipped"] == read[1]["skipped"], read
    assert abs(read[0]["error"] - read[1]["error"]) < 1e-5, read
    return read[0]["skipped"]


def same(one, two):
    one, two = contents(one), contents(two)
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    assert not [name for name in one if one[name] != two[name]]


torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # forks share its own: one killed with it would stop the others
how = json.loads(sys.argv[1])
folder = Path(how.pop("folder"))
os.environ |= {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
line(folder / "straight", False)  # what is imported at the first step is so for all forks
AcceleratorState._reset_state(True)  # a fork may be one of two
gc.collect()
gc.freeze()
kinds = {
    "changes": at_every_change,
    "random": at_random,
    "processes": side_by_side,
    "shards": in_shards,
    "shards of methods": shards_of,
    "skipped": skipped,
}
print(kinds[how.pop("kind")](folder, **how))
"""


def serve(folder, kind, **how):
    """Run the server, and return what it counted."""
    request = json.dumps({"folder": str(folder), "kind": kind, **how})
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", SERVER, request]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_change_of_a_file_and_resumed_it_equals_one_straight_through(
    tmp_path, every
):
    """Weights, optimiser, metrics, kept checkpoints; the slow case before each, some 180 kills."""
    assert serve(tmp_path, "changes", every=every) > 100 // every


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, indirect=True, ids=label)
def test_killed_at_random_moments_every_command_equals_one_straight_through(tmp_path, words):
    """Each 20 times with kill -9: while reading, stepping, measuring and writing."""
    serve(tmp_path, "random", words=list(map(str, words)), kills=20)


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS[1:5], indirect=True, ids=label)
def test_two_processes_of_every_command_equal_one(tmp_path, words):
    """In float64: after 5 steps all parameters and statistics agree to 1e-9.

    LeJEPA and actions are float32 whatever the default is: tests/test_lejepa.py compares losses,
    tests/test_training.py world models.
    """
    line = [*map(str, words), "--steps", "5"]
    assert serve(tmp_path, "processes", words=line) < 1e-9


@pytest.mark.parametrize(
    "words",
    [
        COMMANDS[2],
        *(pytest.param(words, marks=pytest.mark.slow) for words in (*COMMANDS[1:2], *STAGED)),
    ],
    indirect=True,
    ids=label,
)
def test_sharded_over_two_processes_every_command_equals_one(tmp_path, words):
    """Weights and moments in float64, to 1e-9; checkpoints are whole, and resumed either way."""
    line = [*map(str, words), "--steps", "5", "--loop.keep", "3", "--loop.recompute"]
    assert serve(tmp_path, "shards", words=line) < 1e-9


@pytest.mark.slow
def test_sharded_over_two_processes_every_method_of_a_world_model_equals_one(tmp_path):
    """Also by the ways into a part beside `forward`, in two parts of a batch, and recomputed."""
    assert serve(tmp_path, "shards of methods") < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_processes_skip_the_same_steps_when_one_of_them_meets_a_number_that_is_not_finite(
    tmp_path, shard
):
    """Twelve samples, one NaN, four in a batch: two of six steps, as on one process."""
    assert serve(tmp_path, "skipped", shard=shard) == 2
