import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ON_CPU
from torch import nn

from jepa_world.checkpoint import load_tensors
from jepa_world.config import read_yaml
from jepa_world.methods.world_model import Output
from jepa_world.registry import Stopped, UserError
from jepa_world.training import (
    Loop,
    Training,
    batch_index,
    learning_rate,
    make_accelerator,
    train,
)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "train_world_model.py")


class Line(nn.Module):
    """Fit y = 2 x with dropout; the loss is not finite from step `breaks` to before `mends`."""

    def __init__(self, breaks=10**9, mends=10**9):
        super().__init__()
        self.fit, self.dropout = nn.Linear(1, 1), nn.Dropout(0.5)
        self.broken = range(breaks, mends)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch, step):
        loss = (self.fit(self.dropout(batch["x"])) - 2 * batch["x"]).square().mean()
        self.seen += batch["x"].sum()
        loss = loss * torch.nan if step in self.broken else loss
        return Output(loss, {"error": loss.detach()}, torch.randn(8, 2))


def fit(folder, method, *, steps=20, resume=False, read=None, evaluate=None, count=12, **changes):
    """Train a `Line` on twelve numbers and return its parameters."""
    numbers = torch.linspace(-1, 1, count)[:, None]
    how = {"batch_size": 4, "lr": 0.1, "log_every": 2, "checkpoint_every": 5}
    how |= {"loop": Loop()} | changes
    return train(
        *(method, read or (lambda index, step: {"x": numbers[index]}), count),
        Training(steps=steps, resume=resume, **how),
        accelerator=make_accelerator(
            *("no", "none", folder),
            accumulate=how["loop"].accumulate,
            compile=how["loop"].compile,
        ),
        run_dir=folder,
        evaluate=evaluate,
    )


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return (folder / "checkpoint" / "model.safetensors").read_bytes()


def test_every_sample_is_seen_once_an_epoch_in_an_order_of_the_seed():
    steps = range(21)  # 21 batches of 4 are 7 epochs of 12
    order = np.concatenate([batch_index(12, 4, 0, step) for step in steps]).reshape(7, 12)
    assert (np.sort(order) == np.arange(12)).all()
    assert len(np.unique(order, axis=0)) == 7
    other = np.concatenate([batch_index(12, 4, 1, step) for step in steps]).reshape(7, 12)
    assert (order != other).any()


@pytest.mark.parametrize("batch_size", [1, 5, 7, 12])
def test_epochs_follow_each_other_without_gap_when_a_batch_crosses_them(batch_size):
    order = np.concatenate([batch_index(12, batch_size, 3, step) for step in range(24)])
    epochs = order[: len(order) // 12 * 12].reshape(-1, 12)
    assert (np.sort(epochs) == np.arange(12)).all()


def test_the_samples_of_a_step_depend_on_nothing_before_it():
    late = batch_index(1000, 64, 0, 500)
    np.testing.assert_array_equal(late, batch_index(1000, 64, 0, 500))
    assert len(set(late)) == 64


def test_learning_rate_rises_to_its_peak_and_falls_to_a_thousandth():
    rates = [learning_rate(step, 200, 0.5) for step in range(200)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert max(rates) == 0.5 and np.argmax(rates) in (9, 10)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.0005, rel=0.1)
    assert all(learning_rate(0, steps, 0.5) == 0.5 for steps in (1, 2, 19))


def test_a_run_that_is_resumed_on_data_of_another_size_says_so(tmp_path, capsys):
    fit(tmp_path, Line(), steps=5)
    fit(tmp_path, Line(), steps=6, resume=True)
    assert "samples" not in capsys.readouterr().out
    fit(tmp_path, Line(), steps=7, resume=True, count=13)
    assert "the data has 13 samples, it had 12 when the run stopped" in capsys.readouterr().out


def test_it_learns_and_logs_and_measures_in_evaluation_mode(tmp_path):
    method, modes = Line(), []

    def evaluate():
        modes.append((method.training, torch.is_grad_enabled()))
        return {"slope": method.fit.weight.item()}

    last = fit(tmp_path, method, steps=300, log_every=100, evaluate=evaluate)
    assert 0.8 < last["slope"] < 1.2 and last == metrics(tmp_path)[-1]
    assert modes == [(False, False)] * 60 and method.training
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [100, 200, 300]


@pytest.mark.parametrize("stopped", [0, 3, 5, 13])
def test_a_run_that_failed_and_is_resumed_equals_one_straight_through(tmp_path, stopped):
    def read(index, step):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return {"x": torch.linspace(-1, 1, 12)[index, None]}

    torch.manual_seed(1)
    first = Line()
    fit(tmp_path / "straight", first)
    torch.manual_seed(1)
    left = stopped
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "resumed", Line(), read=read)
    torch.manual_seed(1)
    again = Line()
    fit(tmp_path / "resumed", again, resume=True)
    assert weights(tmp_path / "straight") == weights(tmp_path / "resumed")
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "resumed")


def test_a_line_cut_short_by_a_kill_is_dropped_and_written_again(tmp_path):
    torch.manual_seed(1)
    fit(tmp_path, Line())
    log = tmp_path / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole[:-20])
    (tmp_path / "checkpoint" / "model.safetensors.unfinished").write_bytes(b"half")
    torch.manual_seed(1)
    last = fit(tmp_path, Line(), resume=True)
    assert whole.startswith(log.read_text()) and last["step"] == 18


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path):
    torch.manual_seed(1)
    last = fit(tmp_path, Line())
    before = weights(tmp_path), metrics(tmp_path)
    assert fit(tmp_path, Line(), resume=True) == last
    assert (weights(tmp_path), metrics(tmp_path)) == before


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"at step 12 the loss is nan: lower --lr; .*checkpoint'$"):
        fit(tmp_path, Line(breaks=12), loop=Loop(skips=0))
    tensors, facts = load_tensors(tmp_path / "checkpoint" / "model.safetensors")
    assert facts == {"step": 10} and all(tensor.isfinite().all() for tensor in tensors.values())


def test_steps_that_are_not_finite_are_skipped_counted_and_change_nothing(tmp_path):
    """Two of them, at steps 8 and 9: parameters and buffers stay, a resumed run counts on."""
    before = {}

    def read(index, step):
        if step in (8, 10):
            before[step] = {key: value.clone() for key, value in method.state_dict().items()}
        return {"x": torch.linspace(-1, 1, 12)[index, None]}

    torch.manual_seed(0)
    method = Line(breaks=8, mends=10)
    last = fit(tmp_path, method, read=read, log_every=1)
    assert before[8].keys() == before[10].keys() and "seen" in before[8]
    assert all(torch.equal(before[8][key], before[10][key]) for key in before[8])
    lines = metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0] * 8 + [1] + [2] * 11 and last["skipped"] == 2
    assert [line["step"] for line in lines if line["loss"] is None] == [9, 10]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert fit(tmp_path, method, steps=24, resume=True, log_every=1)["skipped"] == 2


def test_more_skipped_steps_in_a_row_than_allowed_end_it_before_a_checkpoint_of_them(tmp_path):
    with pytest.raises(UserError, match="at step 11 the loss is nan, 4 steps in a row: lower --lr"):
        fit(tmp_path, Line(breaks=8), loop=Loop(skips=3))
    assert load_tensors(tmp_path / "checkpoint" / "training.safetensors")[1]["step"] == 5


def test_a_collapse_is_warned_of_once_and_seen_in_the_metrics(tmp_path, capsys):
    class Collapsed(Line):
        def forward(self, batch, step):
            return super().forward(batch, step)._replace(latent=torch.full((8, 2), 3.0))

    fit(tmp_path, Collapsed())
    assert capsys.readouterr().out.count("warning: features have collapsed to a point") == 1
    assert all(line["largest_std"] == 0 for line in metrics(tmp_path) if "loss" in line)


def test_a_run_that_explodes_shows_it_in_the_metrics_before_it_ends(tmp_path):
    with pytest.raises(UserError, match="lower --lr"):
        fit(tmp_path, Line(), steps=400, lr=1e19, log_every=1)
    norms = [line["gradient_norm"] for line in metrics(tmp_path) if "gradient_norm" in line]
    assert norms[0] < 100 and max(norm for norm in norms if norm is not None) > 1e15


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    method, values = Line(), iter([0.5, 0.2, 0.4, 0.3])
    loop = Loop(keep=2, best=("error", "min"))
    fit(tmp_path, method, evaluate=lambda: {"error": next(values)}, loop=loop)
    kept = tmp_path / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == [
        "best",
        "step-00000015",
        "step-00000020",
    ]
    best, facts = load_tensors(kept / "best" / "model.safetensors")
    assert facts == {"step": 10, "number": "error", "value": 0.2}
    newest = (kept / "step-00000020" / "training.safetensors").read_bytes()
    assert newest == (tmp_path / "checkpoint" / "training.safetensors").read_bytes()
    assert not torch.equal(best["fit.weight"], method.fit.weight.cpu())


def test_a_kept_checkpoint_can_be_gone_back_to(tmp_path):
    torch.manual_seed(1)
    fit(tmp_path, Line(), loop=Loop(keep=3))
    straight = weights(tmp_path), metrics(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "checkpoints" / "step-00000010").rename(tmp_path / "checkpoint")
    fit(tmp_path, Line(), resume=True, loop=Loop(keep=3))
    assert (weights(tmp_path), metrics(tmp_path)) == straight


def test_a_best_that_is_not_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--loop.best 'los' is not measured; nearest: loss"):
        fit(tmp_path, Line(), loop=Loop(best=("los", "min")), log_every=5)


def test_sigterm_ends_it_after_the_step_with_a_checkpoint(tmp_path):
    def read(index, step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"x": torch.linspace(-1, 1, 12)[index, None]}

    def once(folder, **options):
        torch.manual_seed(1)
        return fit(tmp_path / folder, Line(), **options)

    before = signal.getsignal(signal.SIGTERM)
    once("straight")
    with pytest.raises(Stopped, match="stopped after step 8 of 20; --resume --run-dir"):
        once("resumed", read=read)
    assert signal.getsignal(signal.SIGTERM) == before
    assert load_tensors(tmp_path / "resumed/checkpoint/training.safetensors")[1]["step"] == 8
    once("resumed", resume=True)
    assert weights(tmp_path / "straight") == weights(tmp_path / "resumed")
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "resumed")


@pytest.mark.parametrize("how", ["full", "blocked"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole(tmp_path, how):
    """A limit on the size of files stands for a full disk, a folder in its place for no access."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def evaluate():
        if (folder / "training.safetensors").exists() and how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        elif (folder / "training.safetensors").exists():
            (folder / "model.safetensors.unfinished").mkdir()
        return {}

    folder, method = tmp_path / "checkpoint", Line()
    method.register_buffer("large", torch.zeros(100_000))
    try:
        with pytest.raises(UserError, match=r"cannot write '.*model.safetensors': .* is whole"):
            fit(tmp_path, method, evaluate=evaluate)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for name in ("model", "training"):
        tensors, facts = load_tensors(folder / f"{name}.safetensors")
        assert facts["step"] == 5 and all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.slow
def test_compiled_it_trains_as_it_does_plain(tmp_path):
    for name, options in (("plain", Loop()), ("compiled", Loop(compile=True))):
        torch.manual_seed(0)
        method = Line()
        method.dropout.p = 0.0
        fit(tmp_path / name, method, loop=options)
    one, two = (
        load_tensors(tmp_path / n / "checkpoint/model.safetensors")[0]
        for n in ("plain", "compiled")
    )
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)


def test_a_longer_gradient_is_shortened_to_the_clip(tmp_path):
    """By a momentum of the first step: AdamW's `exp_avg` is a tenth of the gradient."""
    fit(tmp_path, Line(), steps=1, loop=Loop(clip=1e-3))
    state, _ = load_tensors(tmp_path / "checkpoint" / "training.safetensors")
    moments = torch.cat([v.flatten() for k, v in state.items() if k.endswith("/exp_avg")])
    assert moments.norm().item() == pytest.approx(1e-4, rel=1e-3)


def test_a_checkpoint_of_another_model_is_not_resumed(tmp_path):
    fit(tmp_path, Line())
    before = weights(tmp_path)
    other = Line()
    other.fit = nn.Linear(1, 3)
    with pytest.raises(UserError, match=r"fit\.bias.*another model"):
        fit(tmp_path, other, resume=True)
    assert weights(tmp_path) == before


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="--batch-size 13 is more than the 12 samples"):
        fit(tmp_path, Line(), batch_size=13)


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("tensorbord", "unknown tracker 'tensorbord'; nearest: tensorboard; known: "),
        ("dvclive", "--loop.log-with dvclive: not installed; pip install dvclive"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_refused(tmp_path, tracker, message):
    with pytest.raises(UserError, match=message):
        make_accelerator("no", tracker, tmp_path)


def test_biases_and_gains_have_no_weight_decay(tmp_path):
    method = Line()
    nn.init.constant_(method.fit.bias, 3.0)
    still = {"x": torch.zeros(4, 1)}
    method.fit.weight.register_hook(lambda gradient: 0 * gradient)
    method.fit.bias.register_hook(lambda gradient: 0 * gradient)
    before = method.fit.weight.item()
    fit(tmp_path, method, read=lambda index, step: still, weight_decay=0.5)
    assert method.fit.bias.item() == 3.0 and abs(method.fit.weight.item()) < abs(before)


def test_resuming_repeats_the_settings_of_the_run(tiny_run, tiny_data, tmp_path, call):
    folder = Path(shutil.copytree(tiny_run, tmp_path / "copy"))
    assert call("train_world_model", "--resume", "--run-dir", folder, "--steps", 8).code == 0
    again = read_yaml(folder / "config.yaml")
    assert again == read_yaml(tiny_run / "config.yaml") | {"steps": 8}
    assert [line["step"] for line in metrics(folder)] == [2, 3, 4, 6, 8]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--encoder.dim", 16), "encoder.*'dim': 8.*'dim': 16.*resume it as it was"),
        (("--predictor", "adaln"), "predictor.*'mlp'.*'adaln'.*resume it as it was"),
        (("--batch-size", 1000), "--batch-size 1000 is more than the 70 samples"),
    ],
)
def test_a_run_is_not_resumed_as_another(tiny_run, tmp_path, call, words, message):
    folder = Path(shutil.copytree(tiny_run, tmp_path / "copy"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    complaint = call("train_world_model", "--resume", "--run-dir", folder, *words).complaint()
    assert re.search(message, complaint)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_episodes_shorter_than_the_health_report_train_as_well(tmp_path, tiny_words, call):
    from jepa_world.commands.collect import Collect, collect

    short = Collect(episodes=8, steps=5, workers=1, image_size=32, data=tmp_path / "short")
    words = [*tiny_words, "--data", collect(short), "--run-dir", tmp_path / "run"]
    assert call("train_world_model", *words).code == 0
    assert metrics(tmp_path / "run")[-1]["open_loop_error"] > 0


PROCESSES = """
import sys
from pathlib import Path
import numpy as np, torch
from jepa_world import SIGReg, WorldModel
from jepa_world.encoders.conv import ConvEncoder
from jepa_world.encoders.vit import PooledViTEncoder
from jepa_world.losses import VICReg
from jepa_world.methods.world_model import Output, TeacherWorldModel
from jepa_world.predictors.adaln import AdaLNPredictor
from jepa_world.predictors.mlp import MLPPredictor
from jepa_world.training import Training, make_accelerator, train

class All(torch.nn.Module):
    def __init__(self, *models):
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def forward(self, batch, step):
        losses, terms, latents = zip(*(model(batch, step) for model in self.models))
        return Output(sum(losses), terms[0], latents[0])

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
random = np.random.default_rng(0)
pixels = random.integers(0, 256, (40, 4, 16, 16, 3), dtype=np.uint8)
action = torch.from_numpy(random.uniform(-1, 1, (40, 4, 2)))
torch.manual_seed(0)
conv = ConvEncoder((1, 3, 16, 16), dim=8, width=4, stages=2, hidden=6)
vit = PooledViTEncoder((1, 3, 16, 16), patch=8, dim=8, depth=1, heads=2)
small = [ConvEncoder((1, 3, 16, 16), dim=8, width=4, stages=2, hidden=6) for _ in range(2)]
method = All(
    WorldModel(conv, MLPPredictor(8, 2, width=16), SIGReg(slices=16), weight=0.1),
    WorldModel(vit, AdaLNPredictor(8, 2, width=16, depth=1), SIGReg(slices=16), weight=0.1),
    WorldModel(small[0], MLPPredictor(8, 2, width=16), VICReg(), weight=0.1),
    TeacherWorldModel(small[1], MLPPredictor(8, 2, width=16)),
)
folder = Path(sys.argv[1])
train(
    method, lambda i, step: {"pixels": torch.from_numpy(pixels[i]), "action": action[i]}, 40,
    Training(steps=5, batch_size=8, lr=1e-2, weight_decay=1e-3, log_every=1, checkpoint_every=5),
    accelerator=make_accelerator("no", "none", folder, accumulate=int(sys.argv[2])),
    run_dir=folder,
)
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), "one may meet the interpreter in its end"
"""


NUMBERS = ("one", "two")


def torchrun(*words, **options):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = os.environ | ON_CPU | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*line, *map(str, words)], env=environment, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_equal_one(tmp_path, parts):
    """In float64, where rounding cannot hide a wrong average: parameters agree to 1e-9.

    In the slow case each process adds up the gradients of two parts of its share.
    """
    (tmp_path / "processes.py").write_text(PROCESSES)
    done = torchrun(tmp_path / "processes.py", tmp_path / "two", parts)
    assert done.returncode == 0, done.stderr
    line = [sys.executable, tmp_path / "processes.py", tmp_path / "one", str(parts)]
    subprocess.run(line, check=True, capture_output=True)
    one, two = (load_tensors(tmp_path / n / "checkpoint/model.safetensors")[0] for n in NUMBERS)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-9, msg=key)
    losses = [[line["loss"] for line in metrics(tmp_path / n)] for n in NUMBERS]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_two_processes_of_the_command_equal_one(tmp_path, tiny_data, tiny_words, call):
    """In float32, so but for rounding: of batch norm of frames that are much alike in the first
    step, and behind it of AdamW, which divides small gradients by themselves.
    """
    words = [*tiny_words, "--data", tiny_data, "--log-every", 1, "--run-dir"]
    assert call("train_world_model", *words, tmp_path / "one").code == 0
    done = torchrun(SCRIPT, *words, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout
    one, two = (metrics(tmp_path / name) for name in NUMBERS)
    assert [line.keys() for line in one] == [line.keys() for line in two] and len(one) == 6
    for name in ("loss", "prediction", "sigreg", "gradient_norm"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-4)
        later = [[line[name] for line in run[1:]] for run in (one, two)]
        assert later[1] == pytest.approx(later[0], rel=5e-3)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_by_the_processes_is_refused(tmp_path, tiny_data, tiny_words):
    """Real processes; the others end too."""
    words = [*tiny_words, "--data", tiny_data, "--run-dir", tmp_path / "run", "--batch-size", 7]
    done = torchrun(SCRIPT, *words)
    assert done.returncode != 0
    lines = {line for line in done.stderr.splitlines() if line.startswith("train_world_model")}
    assert lines == {"train_world_model: --batch-size 7 does not divide by 2 processes"}
    assert not (tmp_path / "run").exists()


def test_parts_of_a_batch_accumulate_to_the_step_of_the_whole(tmp_path, monkeypatch):
    """By a flag, or the variable that Accelerate reads: gradients are averaged."""

    def weight(folder, **changes):
        torch.manual_seed(0)
        method = Line()
        method.dropout.p = 0.0
        fit(folder, method, steps=4, **changes)
        return method.fit.weight.item()

    whole = weight(tmp_path / "whole")
    assert weight(tmp_path / "flag", loop=Loop(accumulate=2)) == pytest.approx(whole, rel=1e-5)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert weight(tmp_path / "parts") == pytest.approx(whole, rel=1e-5)
    with pytest.raises(UserError, match="2 steps of accumulation"):
        weight(tmp_path / "odd", batch_size=3)
