"""Judge a world model's latents: what they tell, what surprises them, what moves them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from jepa_world.checkpoint import find_checkpoint
from jepa_world.commands import prepare_process
from jepa_world.commands.collect import play
from jepa_world.commands.plan import Planning, open_env, shipped, stride_of
from jepa_world.config import OR_ROBOT, require_at_least
from jepa_world.data.trajectories import Trajectories, write_shard
from jepa_world.envs import Quantity
from jepa_world.envs.recorder import STATE_COLUMNS
from jepa_world.evaluation import Separation
from jepa_world.interfaces import ImplausibleEnv, NamedStateEnv
from jepa_world.methods.decoder import Decoder, small
from jepa_world.methods.world_model import WorldModel, load_parts, load_world_model
from jepa_world.pictures import Strip, contact_sheet
from jepa_world.policies import actions_of, usual_policy
from jepa_world.probes import ReadOut, linear_read_out, mlp_read_out
from jepa_world.registry import UserError
from jepa_world.runs import Run
from jepa_world.sigreg import SIGReg
from jepa_world.training import Training, make_accelerator, train

STEPS = 40  # of an episode that is collected here, at least
PAIRS, BYTES, NUMBERS = 4000, 2**28, 2**24  # the most that is fitted on: pairs of frames, pixels,
# and numbers of their latents
VARIES = 1e-4  # in the unit of a quantity: R^2 of what varies less says nothing
PROBES = {"linear": linear_read_out, "MLP": mlp_read_out}

Values = dict[str, Float[np.ndarray, "n k"]]
"""Quantities by name, a row for every frame; an angle is two numbers, its cosine and sine."""


@dataclass(frozen=True)
class ProbeWorldModel:
    """Judge what the latents of a world model tell of the state, and what surprises them.

    Without arguments: the model of `reach` that comes with the package.
    """

    env: Annotated[str | None, OR_ROBOT] = None
    """The environment: `reach`, or any Gymnasium id; default: the checkpoint's own."""
    checkpoint: Path | None = None
    """A run folder of train_world_model; default: the model shipped for the environment."""
    data: Path | None = None
    """A dataset of that environment: probes are judged on the last 5 % of its episodes, which
    training holds out too. Default: episodes are collected, and not kept."""
    episodes: int = 160
    """Episodes to collect where there is no --data; a quarter of them judge."""
    moments: int = 200
    """Episodes, one moment of each, that surprise is judged on, and starts seen under factors."""
    history: int = 1
    """Past observations given to the predictor."""
    horizon: int = 10
    """Steps of the rollouts that are imagined and drawn."""
    decoder_steps: int = 1000
    """Steps of 32 frames that the decoder is trained for; 0: no pictures."""
    seed: int = 0
    """Of episodes, the random encoder, read-outs and the decoder."""
    trust: tuple[str, ...] = ()
    """Packages outside jepa_world whose classes a checkpoint may name."""
    run_dir: Path | None = None
    """Where everything is left; default runs/probe_world_model-<time>."""


def run(config: ProbeWorldModel) -> None:
    """Probe; leave results.json and pictures in the run folder."""
    prepare_process()
    require_at_least(config, episodes=4, moments=2, history=1, horizon=1, decoder_steps=0, seed=0)
    made = Run.of("probe_world_model", config.run_dir)
    source = config.checkpoint or shipped(config.env or "reach")
    model, description = load_world_model(source, config.trust)
    stride = stride_of(description)
    env = open_steps(config.env, description)
    store = open_store(config.data, description) if config.data else None
    made.open(config)
    fit, held, films = read_sets(store, env, config, model, stride)
    named = quantities_of(env, fit.last())
    units = {q.name: q.unit for quantities in named.values() for q in quantities}
    values, held_values = (values_of(part.last(), named) for part in (fit, held))
    models = {"model": model, "random encoder": untrained(source, description, config)}
    z = {name: [encode(one, part.pixels) for part in (fit, held)] for name, one in models.items()}

    told, fitted = {}, {}
    for name, (fit_z, held_z) in tqdm(z.items(), "reading out"):
        fitted[name] = fit_read_outs(fit_z, values, config.seed)
        told[name] = judge(fitted[name], held_z, held_values)
    print_read_outs(told, units)
    results: dict[str, Any] = {
        "env": env.spec.id if env.spec else config.env,
        "checkpoint": str(source),
        "fitted_on": len(fit.pixels),
        "judged_on": len(held.pixels),
        "units": units,
        "R^2": told,
        "surprise": surprise(model, env, config, stride),
        "factors": robustness(model, fitted["model"]["one latent"], env, named, config),
    }
    print_surprise(results["surprise"])
    print_factors(results["factors"])
    if config.decoder_steps:
        decoder = fit_decoder(z["model"][0], fit.pixels, config, made.folder)
        results["decoder_R^2"] = pixel_r2(decoder, z["model"][1], held)
        draw(made.folder, decoder, model, held, films, config.history)
        print(f"\nR^2 of the decoder on pixels of held-out frames: {results['decoder_R^2']:.3f}")
    made.finish(results)


class Windows(NamedTuple):
    """Windows of consecutive frames, with their actions and what else is stored of each."""

    pixels: UInt8[np.ndarray, "n t hh ww c"]
    action: Float[np.ndarray, "n t a"]
    columns: dict[str, Float[np.ndarray, "n t k"]]

    @classmethod
    def read(cls, store: Trajectories, length: int, stride: int, at_most: int) -> "Windows":
        """Read windows that are evenly spread over a set."""
        starts = store.windows(length, stride)
        chosen = np.linspace(0, len(starts) - 1, min(at_most, len(starts))).astype(int)
        batch = store.read(starts[chosen], length, stride)
        columns = {name: batch[name] for name in STATE_COLUMNS if name in batch}
        return cls(batch["pixels"], batch["action"], columns)

    def last(self) -> dict[str, Float[np.ndarray, "n k"]]:
        """Return what else is stored of the last frame of every window."""
        return {name: rows[:, -1] for name, rows in self.columns.items()}


def open_steps(name: str | None, description: dict[str, Any]) -> gym.Env[Any, Any]:
    """Make the environment of a world model, whatever the stride of that.

    Raises:
        UserError: it is unknown, or another than the model's.
    """
    name = name or description.get("env")
    if name is None:
        raise UserError("the checkpoint does not say its environment: give --env")
    action_dim = description["action_dim"] // stride_of(description)
    return open_env(Planning(env=name), {**description, "stride": 1, "action_dim": action_dim})


def open_store(path: Path, description: dict[str, Any]) -> Trajectories:
    """Open a dataset that a world model may have been trained on.

    Raises:
        UserError: no dataset, or frames, actions or an environment of another kind.
    """
    store = Trajectories(path, cache_bytes=0)  # few of its frames are read
    _, channels, rows, columns = description["observation_shape"]
    for what, has, expects in (
        ("frames", store.frame_shape, (rows, columns, channels)),
        ("actions", store.action_dim * stride_of(description), description["action_dim"]),
        ("the environment", store.env, description.get("env")),
    ):
        if has != expects and None not in (has, expects):
            raise UserError(f"{what} of {str(path)!r}: {has}, the checkpoint expects {expects}")
    return store


def read_sets(
    store: Trajectories | None,
    env: gym.Env[Any, Any],
    config: ProbeWorldModel,
    model: WorldModel,
    stride: int,
) -> tuple[Windows, Windows, Windows]:
    """Read pairs of frames to fit on, pairs to judge on, and a few long windows to imagine.

    Raises:
        UserError: episodes that are too short, or too few.
    """
    if store is None:
        with TemporaryDirectory() as folder:
            store = collected(env, config, stride, Path(folder))
            return _read_sets(store.split(0.25), config, model, stride)
    return _read_sets(store.split(0.05), config, model, stride)


def _read_sets(
    parts: tuple[Trajectories, Trajectories],
    config: ProbeWorldModel,
    model: WorldModel,
    stride: int,
) -> tuple[Windows, Windows, Windows]:
    training, held_out = parts
    frame = int(np.prod(training.frame_shape))
    width = model.encoder.num_tokens * model.encoder.dim
    most = min(PAIRS, max(20, min(BYTES // frame, NUMBERS // width) // 2))
    longest = (int(held_out.lengths.max()) - 1) // stride + 1
    if longest <= config.history:
        raise UserError(f"held-out episodes have {longest} frames: too few for the --history")
    return (
        Windows.read(training, 2, stride, most),
        Windows.read(held_out, 2, stride, most // 2),
        Windows.read(held_out, min(longest, config.history + config.horizon), stride, 3),
    )


def collected(
    env: gym.Env[Any, Any], config: ProbeWorldModel, stride: int, folder: Path
) -> Trajectories:
    """Collect episodes of the usual policy into a folder."""
    steps = max(STEPS, stride * (config.history + config.horizon - 1))

    def episodes() -> Iterator[dict[str, Any]]:
        for number in tqdm(range(config.episodes), "collecting", mininterval=1.0):
            generator, seed = randomness(config.seed, "episodes", number)
            yield play(env, actions_of(env, usual_policy(env), generator, steps), seed)

    write_shard(folder / "shard-00000.h5", episodes())
    return Trajectories(folder)


def randomness(seed: int, purpose: str, number: int) -> tuple[np.random.Generator, int]:
    """Return a generator for actions and a seed for a reset; `collect` never uses the same."""
    purposes = ("episodes", "moments", "starts")
    sequence = np.random.SeedSequence(seed, spawn_key=(purposes.index(purpose), number))
    return np.random.default_rng(sequence), int(sequence.generate_state(1)[0])


def quantities_of(
    env: gym.Env[Any, Any], columns: Mapping[str, Float[np.ndarray, "n k"]]
) -> dict[str, list[Quantity]]:
    """Return what the numbers of every column are: the environment's names, or their positions.

    Raises:
        UserError: the environment names another number of them.
    """
    widths = {column: rows.reshape(len(rows), -1).shape[1] for column, rows in columns.items()}
    inner: Any = env.unwrapped
    if not isinstance(inner, NamedStateEnv):
        return {
            column: [Quantity(f"{column} {place}", "") for place in range(width)]
            for column, width in widths.items()
        }
    named = {
        column: [Quantity(*entry) for entry in inner.quantities[column]]
        for column in columns
        if column in inner.quantities
    }
    for column, quantities in named.items():
        if len(quantities) != widths[column]:
            raise UserError(
                f"the environment names {len(quantities)} numbers of its {column}, "
                f"there are {widths[column]}"
            )
    return named


def values_of(
    columns: Mapping[str, Float[np.ndarray, "n k"]], named: Mapping[str, Sequence[Quantity]]
) -> Values:
    """Return the values of quantities by name; angles as cosine and sine, modulo their period."""
    values: Values = {}
    for column, quantities in named.items():
        rows = columns[column].reshape(len(columns[column]), -1)
        for quantity, numbers in zip(quantities, rows.T.astype(np.float64), strict=True):
            turn = 2 * np.pi * numbers / quantity.period if quantity.period else numbers
            parts = (np.cos(turn), np.sin(turn)) if quantity.period else (numbers,)
            values.setdefault(quantity.name, np.stack(parts, -1))
    return values


def untrained(source: Path, description: dict[str, Any], config: ProbeWorldModel) -> WorldModel:
    """Return a world model like the one that was loaded, with random weights."""
    file = find_checkpoint(source) / "model.safetensors"
    torch.manual_seed(config.seed)
    parts = load_parts(description, file, config.trust)
    return WorldModel(*parts, SIGReg(), weight=0.0).eval()


@torch.no_grad()
def encode(model: WorldModel, pixels: UInt8[np.ndarray, "n t hh ww c"]) -> Float[Tensor, "n t d"]:
    """Return the latents of windows, the tokens of a frame one behind the other."""
    parts = torch.from_numpy(pixels).split(max(1, 500 // pixels.shape[1]))
    return torch.cat([model.encode(part).flatten(2).float() for part in parts])


def seen_from(z: Float[Tensor, "n t d"]) -> dict[str, Float[Tensor, "n k"]]:
    """Return what a probe is given of the last frame: its latent; with the change up to it."""
    return {"one latent": z[:, -1], "two latents": torch.cat([z[:, -1], z[:, -1] - z[:, -2]], 1)}


ReadOuts = dict[str, ReadOut]
"""Fitted probes by kind, `linear` and `MLP`."""


def fit_read_outs(z: Float[Tensor, "n t d"], values: Values, seed: int) -> dict[str, ReadOuts]:
    """Fit the probes of every quantity at once, by what they see."""
    if not values:
        return {seen: {} for seen in seen_from(z)}
    y = torch.from_numpy(np.concatenate(list(values.values()), 1))
    return {
        seen: {"linear": linear_read_out(x, y), "MLP": mlp_read_out(x, y, seed=seed)}
        for seen, x in seen_from(z).items()
    }


def judge(
    read_outs: Mapping[str, ReadOuts], z: Float[Tensor, "n t d"], values: Values
) -> dict[str, dict[str, dict[str, float]]]:
    """Return R^2 by what is seen, probe and quantity."""
    return {
        seen: {probe: r2_by_name(read(x), values) for probe, read in read_outs[seen].items()}
        for seen, x in seen_from(z).items()
    }


def r2_by_name(predicted: Float[Tensor, "n k"], values: Values) -> dict[str, float]:
    """Return the share of the variance of each quantity that is told, cosine and sine together.

    None of a quantity that hardly varies.
    """
    found: dict[str, float] = {}
    parts = predicted.double().numpy().T.copy()
    widths = np.cumsum([value.shape[1] for value in values.values()])[:-1]
    for (name, value), read in zip(values.items(), np.split(parts, widths), strict=True):
        spread = value - value.mean(0)
        if np.sqrt(np.square(spread).mean(0).max()) > VARIES:
            share = np.square(value - read.T).sum() / np.square(spread).sum()
            found[name] = round(float(1 - share), 4)
    return found


def surprise(
    model: WorldModel, env: gym.Env[Any, Any], config: ProbeWorldModel, stride: int
) -> dict[str, dict[str, Any]]:
    """Return, by what was changed in the next frame, how well each score tells it from the real.

    `prediction error` is |predict(z, a) - z'|, `latent change` |z - z'|, `pixel difference` the
    mean absolute difference of the two frames. Nothing of an environment that shows no such frame.
    """
    if not isinstance(env.unwrapped, ImplausibleEnv):
        return {}
    moments = [
        play_moment(env, config, stride, number)
        for number in tqdm(range(config.moments), "surprising", mininterval=1.0)
    ]
    frames = np.stack([m.frames for m in moments])
    actions = np.stack([m.actions for m in moments])
    before = torch.from_numpy(frames[:, :-1])
    following = {"real": frames[:, -1]}
    following |= {kind: np.stack([m.odd[kind] for m in moments]) for kind in moments[0].odd}
    scores: dict[str, dict[str, list[float]]] = {}
    with torch.no_grad():
        z = torch.cat([model.encode(part) for part in before.split(100)])
        predicted = model.rollout(z, torch.from_numpy(actions)).flatten(1)
    for kind, pictures in following.items():
        came = encode(model, pictures[:, None])[:, 0]
        pixels = np.abs(pictures.astype(np.float32) - frames[:, -2])
        scores[kind] = {
            "prediction error": (predicted - came).norm(dim=1).tolist(),
            "latent change": (z[:, -1].flatten(1) - came).norm(dim=1).tolist(),
            "pixel difference": pixels.mean((1, 2, 3)).tolist(),
        }
    real = scores.pop("real")
    return {
        kind: {name: asdict(Separation.of(real[name], odd[name])) for name in odd}
        for kind, odd in scores.items()
    }


class Moment(NamedTuple):
    """Frames, the last of which came after the actions, and others that could not have come."""

    frames: UInt8[np.ndarray, "t hh ww c"]
    actions: Float[np.ndarray, "u a"]
    odd: dict[str, UInt8[np.ndarray, "hh ww c"]]


def play_moment(
    env: gym.Env[Any, Any], config: ProbeWorldModel, stride: int, number: int
) -> Moment:
    """Play an episode of the usual policy up to a step drawn at random."""
    generator, seed = randomness(config.seed, "moments", number)
    steps = config.history + int(generator.integers(20))
    frames, taken = [env.reset(seed=seed)[0]], []
    actions = actions_of(env, usual_policy(env), generator, steps * stride)
    for _ in range(steps):
        block, seen = [], frames[-1]
        for action in islice(actions, stride):
            seen, *_ = env.step(action)
            block.append(action)
        frames.append(seen)
        taken.append(np.concatenate(block))
    inner: Any = env.unwrapped
    kept = config.history
    return Moment(
        np.stack(frames[-kept - 1 :]), np.stack(taken[-kept:]), inner.implausible(generator)
    )


def robustness(
    model: WorldModel,
    read_outs: ReadOuts,
    env: gym.Env[Any, Any],
    named: Mapping[str, Sequence[Quantity]],
    config: ProbeWorldModel,
) -> dict[str, dict[str, Any]]:
    """Return, by factor, R^2 of probes fitted without it and the share that it moves latents by.

    Starts of episodes, at rest, seen without and with the factor drawn at random. The shift is the
    mean distance between the two latents over that between two starts. Nothing of an environment
    without factors.
    """
    _, info = env.reset(seed=0)
    if "factors" not in info:
        return {}
    if not named.keys() <= info.keys():  # known of a dataset only
        named, read_outs = {}, {}
    numbers = range(config.moments)
    seeds = [randomness(config.seed, "starts", number)[1] for number in numbers]
    pairs = [env.reset(seed=seed, options={"factors": None}) for seed in seeds]
    plain = encode(model, np.stack([seen for seen, _ in pairs])[:, None])[:, 0]
    values = values_of({c: np.stack([info[c] for _, info in pairs]) for c in named}, named)
    apart = (plain - plain.roll(1, 0)).norm(dim=1).mean()
    found: dict[str, dict[str, Any]] = {"none": _told(read_outs, plain, values, 0.0)}
    for factor in tqdm(info["factors"], "varying"):
        asked = {"factors": {factor: "random"}}
        seen = np.stack([env.reset(seed=seed, options=asked)[0] for seed in seeds])
        z = encode(model, seen[:, None])[:, 0]
        shift = float((z - plain).norm(dim=1).mean() / apart)
        found[factor] = _told(read_outs, z, values, shift)
    return found


def _told(
    read_outs: ReadOuts, z: Float[Tensor, "n d"], values: Values, shift: float
) -> dict[str, Any]:
    """Return R^2 of what varies between starts, by probe, and the shift."""
    r2 = {probe: r2_by_name(read(z), values) for probe, read in read_outs.items()}
    return {**r2, "shift": round(shift, 4)}


def fit_decoder(
    z: Float[Tensor, "n t d"],
    pixels: UInt8[np.ndarray, "n t hh ww c"],
    config: ProbeWorldModel,
    folder: Path,
) -> Decoder:
    """Train a decoder on latents as they are."""
    latents, frames = z[:, -1], pixels[:, -1]
    torch.manual_seed(config.seed)
    some = torch.from_numpy(frames[:: max(1, len(frames) // 1000)])
    decoder = Decoder(latents.shape[1], small(some).mean(0))

    def read(index: Int[np.ndarray, " b"], step: int) -> dict[str, Tensor]:
        return {"latent": latents[index], "pixels": torch.from_numpy(frames[index])}

    how = Training(
        steps=config.decoder_steps,
        batch_size=min(32, len(latents)),
        lr=3e-3,
        weight_decay=1e-4,
        seed=config.seed,
        checkpoint_every=config.decoder_steps,
    )
    accelerator = make_accelerator("no", "none", folder / "decoder")
    train(decoder, read, len(latents), how, accelerator=accelerator, run_dir=folder / "decoder")
    return decoder.cpu().eval()


@torch.no_grad()
def pixel_r2(decoder: Decoder, z: Float[Tensor, "n t d"], held: Windows) -> float:
    """Return the share of the variance of pixels, about the mean picture, that is drawn."""
    error = variance = 0.0
    frames = torch.from_numpy(held.pixels[:, -1])
    for part, shown in zip(z[:, -1].split(500), frames.split(500), strict=True):
        wanted = small(shown)
        error += float((decoder.decode(part) - wanted).square().sum())
        variance += float((decoder.mean - wanted).square().sum())
    return round(1 - error / variance, 4)


def draw(
    folder: Path,
    decoder: Decoder,
    model: WorldModel,
    held: Windows,
    films: Windows,
    history: int,
) -> None:
    """Draw held-out frames above what their latents show, and rollouts beside what happened."""
    chosen = np.linspace(0, len(held.pixels) - 1, 10).astype(int)
    frames = held.pixels[chosen, -1:]
    shown = decoder.draw(encode(model, frames)[:, 0]).numpy()
    numbers = chosen.tolist()
    pairs = [Strip("frame", numbers, frames[:, 0]), Strip("decoded", numbers, shown)]
    contact_sheet(pairs).savefig(folder / "decoder.png", dpi=100)
    strips: list[Strip] = []
    with torch.no_grad():
        z = model.encode(torch.from_numpy(films.pixels[:, :history]))
        future = model.rollout(z, torch.from_numpy(films.action[:, :-1]))
    last = films.pixels.shape[1] - history
    steps = sorted({round(share * last) for share in np.linspace(0, 1, 6)})
    for number, pixels in enumerate(films.pixels):
        imagined = torch.cat([z[number, -1:], future[number]]).flatten(1)
        real = pixels[history - 1 :]
        strips.append(Strip("what happened", steps, real[steps]))
        strips.append(Strip("imagined", steps, decoder.draw(imagined[steps]).numpy()))
    contact_sheet(strips).savefig(folder / "imagined.png", dpi=100)


def print_read_outs(told: dict[str, Any], units: dict[str, str]) -> None:
    """Print R^2 of every quantity: what is read, from what, by which probe."""
    if not units:
        print("the environment gives neither state nor proprio: nothing to read out")
        return
    labels = {name: f"{name} [{unit}]" if unit else name for name, unit in units.items()}
    width = max(24, *map(len, labels.values()))
    kinds = [(seen, probe) for seen in ("one latent", "two latents") for probe in PROBES]
    heads = "".join(f"{f'{seen}, {probe}':>20}" for seen, probe in kinds)
    for model, rows in told.items():
        print(f"\n{f'R^2, {model}':<{width}}{heads}")
        for name, label in labels.items():
            cells = (rows[seen][probe].get(name) for seen, probe in kinds)
            print(f"{label:<{width}}" + "".join(f"{_cell(cell):>20}" for cell in cells))


def print_surprise(found: dict[str, dict[str, Any]]) -> None:
    """Print the AUROC of every change and score."""
    if not found:
        print("\nthe environment has no method `implausible`: surprise is not measured")
        return
    scores = next(iter(found.values()))
    print("\n" + f"{'AUROC (95 %)':<24}" + "".join(f"{name:>26}" for name in scores))
    for kind, rows in found.items():
        cells = (f"{r['auroc']:.3f} ({r['low']:.3f}-{r['high']:.3f})" for r in rows.values())
        print(f"{kind:<24}" + "".join(f"{cell:>26}" for cell in cells))
    print(f"n {next(iter(scores.values()))['n']} of each kind")


def print_factors(found: dict[str, dict[str, Any]]) -> None:
    """Print mean and worst R^2 under every factor, and how far it moves latents."""
    if not found:
        print("\nthe environment has no factors of variation")
        return
    print(f"\n{'factor':<24}{'R^2 linear, worst':>20}{'MLP, worst':>20}{'shift':>10}")
    for factor, row in found.items():
        cells = ""
        for probe in PROBES:
            r2 = list(row.get(probe, {}).values())
            told = f"{np.mean(r2):.3f}, {min(r2):.3f}" if r2 else "-"
            cells += f"{told:>20}"
        print(f"{factor:<24}{cells}{row['shift']:>10.1%}")


def _cell(r2: float | None) -> str:
    """Return a number of a table; a dash for what does not vary."""
    return "-" if r2 is None else f"{r2:.3f}"
