"""Goal-conditioned behaviour cloning: the baseline that needs no world model, at equal data.

    loss = mean |policy(encode(frame_t), encode(frame_{t+k})) - a_t|^2

The encoder is the world model's, its weights trained with a perceptron on both latents; a goal is a
later frame of the same episode, every one as likely (hindsight: Ding et al., arXiv 1906.05838). A
sample is two frames, so that the default batch encodes the frames of a step of
configs/world_reach.yaml. What it costs is stated in CPU-seconds; steps are what `--seconds` of them
hold, by a step time measured just before.

    python benchmarks/behaviour_cloning.py train --seconds 240 --run-dir runs/cloned0
    python benchmarks/behaviour_cloning.py evaluate --policy runs/cloned0 --ahead 25 --budget 50

Episodes, protocols and results.json are those of evaluate.py, whose numbers of random actions come
out again; there is no simulator's ceiling, as nothing plans.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from jepa_world.checkpoint import build_part, find_checkpoint, load_weights, observation_shape
from jepa_world.commands import prepare_process
from jepa_world.commands.evaluate import play, random_policies, summary
from jepa_world.commands.plan import Planning, budget_of, open_env, tolerance_of
from jepa_world.commands.train_world_model import collect_default
from jepa_world.config import Part, parse, part_from_dict, read_yaml, require_at_least, to_dict
from jepa_world.data.trajectories import Trajectories
from jepa_world.evaluation import Frame, Policy, unsolved_seeds
from jepa_world.methods.world_model import Output, as_video
from jepa_world.registry import UserError
from jepa_world.runs import Run
from jepa_world.training import Training, begin, make_accelerator, train


@dataclass(frozen=True)
class Train(Training):
    """Train a policy to act as the data does on the way to what it shows later."""

    data: Path = Path("data/reach")
    """Dataset: a folder of shards that collect.py made."""
    encoder: Part = Part("conv")
    """Maps frames to latents."""
    width: int = 256
    """Units of a hidden layer of the policy."""
    depth: int = 3
    """Number of hidden layers."""
    seconds: float | None = None
    """CPU time of the steps, in the place of their number."""
    steps: int = 2500
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 1e-3


@dataclass(frozen=True)
class Evaluate:
    """Measure the success of policies, beside random actions."""

    policy: tuple[Path, ...] = ()
    """Run folders of policies trained from different seeds."""
    env: str = "reach"
    """The environment, as in evaluate.py; so are the other flags."""
    episodes: int = 200
    budget: int | None = None
    tolerance: float | None = None
    ahead: int | None = None
    factors: tuple[str, ...] | None = None
    seed: int = 0
    run_dir: Path | None = None


class Cloned(nn.Module):
    """An encoder and a policy that is given the latents of what is seen and of the goal."""

    def __init__(self, encoder: Any, action_dim: int, *, width: int, depth: int) -> None:
        super().__init__()
        self.encoder = encoder
        widths = [2 * encoder.num_tokens * encoder.dim, *[width] * depth]
        layers = [(nn.Linear(*pair), nn.SiLU()) for pair in pairwise(widths)]
        self.policy = nn.Sequential(*sum(layers, ()), nn.Linear(widths[-1], action_dim))

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of pairs `pixels (b 2 hh ww c)` and the first one's `action (b a)`."""
        z = self.encode(batch["pixels"])
        error = F.mse_loss(self.act(*z.unbind(1)), batch["action"])
        return Output(error, {"action": error.detach()}, rearrange(z.detach(), "b t d -> (b t) d"))

    def encode(self, pixels: UInt8[Tensor, "b t hh ww c"]) -> Float[Tensor, "b t d"]:
        """Encode byte frames, all tokens of a frame side by side."""
        z = self.encoder(as_video(pixels)).to(torch.get_default_dtype())
        return rearrange(z, "b t n d -> b t (n d)")

    def act(self, z: Float[Tensor, "b d"], goal: Float[Tensor, "b d"]) -> Float[Tensor, "b a"]:
        """Return actions, not clipped, that lead from latents to the goal's."""
        return self.policy(torch.cat([z, goal], -1))


class ClonedPolicy:
    """A trained policy in one episode at a time."""

    def __init__(self, model: Cloned) -> None:
        self.model = model

    @torch.no_grad()
    def reset(self, goal: Frame) -> None:
        """Encode the goal."""
        self.goal = self.model.encode(torch.from_numpy(goal)[None, None])[:, 0]

    @torch.no_grad()
    def act(self, observation: Frame) -> Float[np.ndarray, " a"]:
        """Encode what is seen and return an action, clipped to [-1, 1]."""
        z = self.model.encode(torch.from_numpy(observation)[None, None])[:, 0]
        return self.model.act(z, self.goal)[0].clamp(-1, 1).numpy()


class Pairs:
    """Frames of episodes, each with the action that follows, and a later frame of the same."""

    def __init__(self, store: Trajectories, seed: int) -> None:
        self.store, self.seed = store, seed
        self.starts = store.windows(2)  # all frames but the last one of an episode
        steps = store.lengths - 1
        self.last = np.repeat(self.starts[np.cumsum(steps) - steps] + steps, steps)

    def __call__(self, index: Int[np.ndarray, " b"], step: int) -> dict[str, Tensor]:
        """Return the batch of some samples at a step."""
        now = self.store.read(self.starts[index], 1)
        later = self.store.read(self.goals(index, step), 1)
        pixels = np.concatenate([now["pixels"], later["pixels"]], 1)
        return {"pixels": torch.from_numpy(pixels), "action": torch.from_numpy(now["action"][:, 0])}

    def goals(self, index: Int[np.ndarray, " b"], step: int) -> Int[np.ndarray, " b"]:
        """Draw a later frame for each of some samples, a function of (seed, step, sample)."""
        chance = np.random.default_rng([self.seed, step]).random(len(self.starts))[index]
        starts, last = self.starts[index], self.last[index]
        return starts + 1 + (chance * (last - starts)).astype(int)


def train_policy(config: Train) -> None:
    """Train; leave config.yaml, metrics.jsonl, results.json and checkpoint/ in the run folder."""
    prepare_process()
    require_at_least(config, width=1, depth=1, steps=1, batch_size=2, log_every=1)
    require_at_least(config, lr=0, weight_decay=0, seed=0, checkpoint_every=1)
    made = Run.of("behaviour_cloning", config.run_dir)
    if config.data == Path("data/reach"):
        collect_default(config.data)
    store = Trajectories(config.data)
    training, held_out = (Pairs(part, config.seed) for part in store.split(0.05))
    description = {
        "method": "behaviour_cloning",
        "env": store.env,
        "observation_shape": [1, store.frame_shape[2], *store.frame_shape[:2]],
        "action_dim": store.action_dim,
        **{name: to_dict(config)[name] for name in ("encoder", "width", "depth")},
    }
    if config.seconds is not None:
        require_at_least(config, seconds=1)
        steps = max(1, round(config.seconds / step_seconds(config, description, training)))
        config = dataclasses.replace(config, steps=steps, seconds=None)
    accelerator = make_accelerator(config.precision, config.loop.log_with, made.folder)
    method = build(config, description)
    begin(made, config, description, len(training.starts), accelerator)
    print(store.origin)
    last = train(
        *(method, training, len(training.starts), config),
        accelerator=accelerator,
        run_dir=made.folder,
        evaluate=lambda: {"action_error": action_error(method, held_out)},
    )
    made.finish({**last, "seed": config.seed})


def build(config: Train, description: dict[str, Any]) -> Cloned:
    torch.manual_seed(config.seed)
    part = part_from_dict(description["encoder"])
    encoder = part.build("encoder", tuple(description["observation_shape"]))
    words = {"width": config.width, "depth": config.depth}
    return Cloned(encoder, description["action_dim"], **words)


def step_seconds(
    config: Train, description: dict[str, Any], pairs: Pairs, *, steps: int = 30
) -> float:
    """Return the CPU time of a training step, reading included: the median of some."""
    method = build(config, description)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    index = np.linspace(0, len(pairs.starts) - 1, config.batch_size).astype(int)
    times: list[float] = []
    for step in range(steps):
        began = time.process_time()
        method(pairs(index, step), step).loss.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - began)
    return statistics.median(times[steps // 3 :])


def action_error(model: Cloned, pairs: Pairs, *, count: int = 512) -> float:
    """Return the squared error of held-out actions, as a share of their variance."""
    samples = len(pairs.starts)
    index = np.linspace(0, samples - 1, min(count, samples)).astype(int)
    batch = pairs(index, 0)
    device = next(model.parameters()).device
    z = model.encode(batch["pixels"].to(device))
    error = (model.act(*z.unbind(1)).cpu() - batch["action"]).square().mean()
    return float(error / batch["action"].var(0, correction=0).mean())


def load(path: Path) -> tuple[Cloned, dict[str, Any]]:
    """Load a policy from its run folder, in evaluation mode, with its description.

    Raises:
        UserError: no checkpoint there, damaged, or of another method.
    """
    folder = find_checkpoint(path)
    description = read_yaml(folder / "config.yaml")
    method, file = description.get("method"), folder / "model.safetensors"
    if method != "behaviour_cloning":
        raise UserError(f"{str(folder)!r} holds the method {method!r}, expected behaviour_cloning")
    shape = observation_shape(description)
    encoder = build_part(description, "encoder", shape, file=file, trusted=())
    words = {name: description[name] for name in ("width", "depth")}
    model = Cloned(encoder, description["action_dim"], **words)
    load_weights(model, file)
    return model.eval(), description


def evaluate_policies(config: Evaluate) -> None:
    """Measure, and leave results.json in the run folder."""
    prepare_process()
    require_at_least(config, episodes=1, seed=0)
    if not config.policy:
        raise UserError("--policy names no run folder of a policy: train one")
    made = Run.of("behaviour_cloning", config.run_dir)
    names = ("env", "budget", "tolerance", "ahead", "factors", "seed")
    planning = Planning(**{name: vars(config)[name] for name in names})
    models = {str(path): load(path) for path in config.policy}
    env, *_ = [open_env(planning, description) for _, description in models.values()]
    tolerance, budget = tolerance_of(planning, env), budget_of(planning, env)
    seeds = unsolved_seeds(env, config.episodes, config.seed, tolerance)
    made.open(config)

    def of(model: Cloned) -> Callable[[int], Policy]:
        return lambda seed: ClonedPolicy(model)

    by_model = {
        name: play(name, env, of(model), seeds, budget) for name, (model, _) in models.items()
    }
    others = {"random": play("random", env, random_policies(env), seeds, budget)}
    results = {"env": config.env, "budget": budget, "seeds": seeds}
    made.finish(results | summary(by_model, others, tolerance))


def main() -> None:
    program, *words = sys.argv[1:] or ["--help"]
    configs: dict[str, Any] = {"train": Train, "evaluate": Evaluate}
    if program not in configs:
        print(__doc__)
        raise SystemExit(0 if program == "--help" else 2)
    try:
        config = parse(configs[program], words, program=program)
        (train_policy if program == "train" else evaluate_policies)(config)
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
