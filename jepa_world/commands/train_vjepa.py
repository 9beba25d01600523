"""Train a video encoder by V-JEPA: hidden tubes are predicted, features are Gaussian."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from jaxtyping import Int, UInt8
from torch import Tensor, nn

import jepa_world
from jepa_world.checkpoint import encoder_weights, find_checkpoint, load_state
from jepa_world.commands import prepare_process
from jepa_world.commands.image_training import open_shards
from jepa_world.commands.train_ijepa import MOMENTUM, check_objective
from jepa_world.config import Part, require_at_least, to_dict
from jepa_world.data.clips import Clips, hold_out, load_clips, stream_clips
from jepa_world.data.files import BAD_SHARE, naming_lost_readers
from jepa_world.data.images import Images, load_images
from jepa_world.data.motion import letters, write_motion_clips
from jepa_world.data.shards import Shards, is_sharded
from jepa_world.data.video import SUFFIXES
from jepa_world.interfaces import Encoder
from jepa_world.losses import Distance
from jepa_world.methods.ijepa import IJEPA, TeacherIJEPA
from jepa_world.methods.vjepa import MaskKind, build_vjepa
from jepa_world.pictures import clip_picture, tube_picture
from jepa_world.probes import attentive_probe, clip_features, clip_tokens, knn_probe
from jepa_world.registry import UserError
from jepa_world.runs import Run
from jepa_world.testing import check_encoder, check_masked_predictor
from jepa_world.training import Training, begin, make_accelerator, train

DEFAULT = Path("data/motion")
TINY = {
    **{"dim": 96, "depth": 4, "heads": 3, "patch": 8, "tubelet": 2},
    **{"positions": "rotary", "standardise": True},
}  # options of the default encoder


@dataclass(frozen=True)
class ClipFlags:
    """What is cut from videos, and how it is read."""

    frames: int = 16
    """Frames of a clip."""
    fps: float = 8.0
    """Frames a second of a clip, whatever the video's own."""
    size: int = 48
    """Side in pixels: the middle square of a frame is scaled to it."""
    stages: tuple[tuple[float, int, int], ...] = ()
    """Shorter or smaller clips at first: share of the steps, frames and size of every stage; the
    steps that are left have the full ones."""
    cache: bool = False
    """Decode all videos once and keep them in memory, for sets that fit."""
    workers: int = 0
    """Processes that read and decode ahead."""
    patience: float = 600.0
    """Seconds without a batch of theirs after which they are taken to hang."""
    bad_share: float = BAD_SHARE
    """Of the videos that may be unreadable; in small sets a tenth may be, and ten."""
    images: Path | None = None
    """Images for every fourth step, as many as have the tokens of its clips: joint training."""


@dataclass(frozen=True)
class PredictFlags:
    """What is hidden, how much of it is predicted, and how the error is measured."""

    masks: tuple[MaskKind, ...] = ("short", "long")
    """Kinds of masks that take turns: blocks of .15 of the frame, of .7, places one by one."""
    share: float = 1.0
    """Share of the hidden tokens that is predicted: less is cheaper. Below 1 the context is drawn
    token by token from what is no target."""
    seen: float | None = None
    """Share of the tokens that is seen. Default: a quarter in short masks, a tenth in others."""
    distance: Distance = "l2"
    """Between tokens predicted and tokens to predict; V-JEPA has l1 with its teacher."""
    stop_gradient: bool = True
    """Targets are taken as given. Without, hidden tokens learn to be foretold, too."""
    final_weight: float | None = None
    """Where the weight of SIGReg of tokens against the error falls to, geometrically, until the
    last step. Default: it stays."""


@dataclass(frozen=True)
class TrainVjepa(Training):
    """Train an encoder on videos without labels: error of hidden tubes + weight * SIGReg.

    Without arguments: generated clips of moving letters, and what the features tell of the motion
    and of the letter.
    """

    data: Path = DEFAULT
    """A folder or tar of videos, a list of files, or a csv with labels; or shards, looked up as
    they are read: x-{000..099}.tar, x-*.tar, a folder of tars, a list of them, or videos/**.
    data/motion is generated if it is not there."""
    clips: ClipFlags = ClipFlags()
    """What is cut from the videos."""
    start: Path | None = None
    """Run folder of an encoder of images or videos, whose weights are the first."""
    encoder: Part = Part("vit", dict(TINY))
    """Maps clips to tokens on a grid."""
    masked_predictor: Part = Part("cross", {"width": 64, "depth": 2, "heads": 2})
    """Maps visible tokens to hidden ones."""
    predict: PredictFlags = PredictFlags()
    """What is hidden, how much of it is predicted, and how the error is measured."""
    views: tuple[float, float] = (0.7, 0.5)
    """The context is seen in one view of the clip, targets in another: least share of the frame
    that a view keeps, and strength of jitter, greying, blur and solarising."""
    teacher: Literal["none", "ema"] = "none"
    """none: SIGReg keeps features from collapsing; ema: a moving average does, as published with
    --views 1 0 --predict.distance l1."""
    weights: tuple[float, float] = (10.0, 1.0)
    """Weights against the error of tokens: of SIGReg of tokens, without its factor N, and of
    foretelling the hidden part as a whole, with a SIGReg of its own."""
    steps: int = 500
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 5e-2


def run(config: TrainVjepa) -> None:
    """Train; leave config.yaml, metrics.jsonl, results.json and checkpoint/ in the run folder."""
    prepare_process()
    check(config)
    made = Run.of("train_vjepa", config.run_dir)
    accelerator = make_accelerator(
        *(config.precision, config.loop.log_with, made.folder),
        accumulate=config.loop.accumulate,
        compile=config.loop.compile,
    )
    shape = (config.clips.frames, 3, config.clips.size, config.clips.size)
    description = describe(config, shape)
    torch.manual_seed(config.seed)
    method = checked_vjepa(description, shape)
    if config.start is not None:
        start_from(method, config.start)
    if accelerator.is_main_process and config.data == DEFAULT:
        write_default(config.data)
    accelerator.wait_for_everyone()
    parts = find_parts(config, accelerator)
    images = config.clips.images and load_images(config.clips.images, size=config.clips.size)[0]

    begin(made, config, description, len(parts.training), accelerator)
    training, held_out = (part.noting(made.folder) for part in (parts.training, parts.held_out))
    accelerator.print(
        f"{len(training)} videos, {sum(p.numel() for p in method.parameters()):,} parameters, "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    skipped = training.skipped
    if skipped:
        accelerator.print(skipped.summary())
    with naming_lost_readers(made.folder):
        last = train(
            *(method, Reader(training, images, config), len(training), config),
            accelerator=accelerator,
            run_dir=made.folder,
            evaluate=lambda: quick_probe(method.encoder, parts.fit, held_out, config.clips),
            sizes=parts.sizes,
            workers=config.clips.workers,
            patience=config.clips.patience,
        )
    if accelerator.is_main_process:
        torch.manual_seed(config.seed)
        random = build_vjepa(description).to(next(method.parameters()).device)
        encoders = {"trained": method.eval().encoder, "random": random.eval().encoder}
        probed = beside_a_random_encoder(encoders, parts.whole, parts.test, config.clips)
        draw_clips(made.folder, method, held_out, config.clips)
        skipped.recall()
        if skipped:
            print(skipped.summary())
        made.finish({**last, "seed": config.seed, "probe": probed, **skipped.results()})


@dataclass(frozen=True)
class Parts:
    """A set of videos in parts: what is trained on, and what is measured on."""

    training: Clips
    fit: Clips
    """What probes are fitted to during training."""
    held_out: Clips
    whole: Clips
    """What probes are fitted to in the end."""
    test: Clips
    sizes: Int[np.ndarray, " shards"] | None = None
    """Videos of each shard, where they lie in shards."""


def find_parts(config: TrainVjepa, accelerator: Accelerator) -> Parts:
    """List all videos, or count those of shards and list some.

    Raises:
        UserError: nothing there, too many that cannot be read, or shards that are to be cached.
    """
    flags = config.clips
    if is_sharded(config.data) and not (flags.cache and config.data.is_dir()):
        if flags.cache:
            raise UserError("--clips.cache keeps a list of videos in memory: shards are not listed")
        found = (config.data, SUFFIXES, config.batch_size, flags.bad_share, accelerator)
        training, fit, other = stream_clips(open_shards(*found), bad_share=flags.bad_share)
        held_out, test = (other.take(np.arange(begin, len(other), 2)) for begin in (0, 1))
        assert isinstance(training.files, Shards)
        return Parts(training, fit, held_out, fit, test, training.files.sizes)
    whole, test = load_parts(config.data, flags.bad_share)
    small = config.data == DEFAULT and not flags.stages
    if flags.cache or small:
        whole, test = (part.cached(size=flags.size) for part in (whole, test))
    training, held_out = hold_out(whole)
    return Parts(training, training, held_out, whole, test)


@dataclass(frozen=True)
class Reader:
    """Reads the batch of a step: clips of the shape of its stage, or images in their turn."""

    clips: Clips
    images: Images | None
    config: TrainVjepa

    def __call__(self, index: Int[np.ndarray, " b"], step: int) -> dict[str, Tensor]:
        """Return `pixels`, bytes, of the samples `index`, and what number each has in the data."""
        if self.images is not None and step % 4 == 3:
            return self._images(self.images, index)
        frames, size = stage(self.config, step)
        pixels, drawn = self.clips.draw(
            index,
            frames=frames,
            fps=self.config.clips.fps,
            size=size,
            seed=self.config.seed,
            step=step,
        )
        return {"pixels": torch.from_numpy(pixels), "index": torch.from_numpy(drawn)}

    def _images(self, images: Images, index: Int[np.ndarray, " b"]) -> dict[str, Tensor]:
        """Return as many images for every clip as it has steps of tokens in time."""
        times = max(1, self.config.clips.frames // self.config.encoder.options.get("tubelet", 1))
        drawn = (index[:, None] * times + np.arange(times)).ravel()
        pixels = images.pixels[drawn % len(images)]
        if pixels.shape[-1] == 1:
            pixels = np.repeat(pixels, 3, -1)
        return {"pixels": torch.from_numpy(pixels), "index": torch.from_numpy(drawn)}


def stage(config: TrainVjepa, step: int) -> tuple[int, int]:
    """Return the frames and the size of the clips of a step."""
    done = 0.0
    for share, frames, size in config.clips.stages:
        done += share
        if step < round(done * config.steps):
            return frames, size
    return config.clips.frames, config.clips.size


def write_default(folder: Path, *, items: int = 3000, test_items: int = 750) -> None:
    """Write the clips of moving letters, or finish an interrupted writing."""
    for part, count, seed in (("train", items, 0), ("test", test_items, 1)):
        if not (folder / part / "clips.csv").is_file():
            write_motion_clips(folder / part, letters(count, seed=seed), seed=seed)


def load_parts(data: Path, bad_share: float = BAD_SHARE) -> tuple[Clips, Clips]:
    """Return the training and the test part: the folders `train` and `test`, or a part held out."""
    parts = [data / name for name in ("train", "test")]
    if not all(part.is_dir() for part in parts):
        return hold_out(load_clips(data, bad_share=bad_share))
    lists = [part / "clips.csv" for part in parts]
    training, test = (
        load_clips(listed if listed.is_file() else part, bad_share=bad_share)
        for part, listed in zip(parts, lists, strict=True)
    )
    return training, relabelled(test, training)


def relabelled(clips: Clips, like: Clips) -> Clips:
    """Return clips whose labels have the numbers that others give to the same words.

    Raises:
        UserError: a word that the others do not have.
    """
    classes = dict(clips.classes)
    for factor, words in clips.class_names.items():
        known = like.class_names.get(factor, ())
        if unknown := set(words) - set(known):
            raise UserError(
                f"{factor} {min(unknown)!r} is in the test part, not in the training part"
            )
        classes[factor] = np.array([known.index(word) for word in words])[classes[factor]]
    return replace(clips, classes=classes, class_names=like.class_names)


def describe(config: TrainVjepa, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return what the checkpoint holds beside the weights: how the method is built."""
    (crop, colour), (weight, whole) = config.views, config.weights
    teacher = {"momentum": MOMENTUM, "steps": config.steps}
    fall = {"final_weight": config.predict.final_weight, "steps": config.steps}
    return {
        "method": "vjepa",
        "observation_shape": list(shape),
        "encoder": to_dict(config)["encoder"],
        "masked_predictor": to_dict(config)["masked_predictor"],
        "masks": list(config.predict.masks),
        "predict": config.predict.share,
        "seen": config.predict.seen,
        "teacher": teacher if config.teacher == "ema" else None,
        "views": {"crop": crop, "colour": colour},
        "whole": whole,
        "distance": config.predict.distance,
        "stop_gradient": config.predict.stop_gradient,
        "sigreg": {"slices": 64, "seed": config.seed, "weight": weight, **fall},
        "jepa_world": jepa_world.__version__,
    }


def checked_vjepa(
    description: dict[str, Any], shape: tuple[int, int, int, int]
) -> IJEPA | TeacherIJEPA:
    """Build the method; its parts may be anybody's, and keep their contracts."""
    method = build_vjepa(description)
    encoder: Any = method.encoder
    check_encoder(method.get_submodule("encoder"), shape)
    check_masked_predictor(method.get_submodule("predictor"), encoder.dim, encoder.grid)
    return method


def start_from(method: IJEPA | TeacherIJEPA, run: Path) -> None:
    """Give the encoder the weights of a trained one, of images or of videos.

    A map of patches of one frame is laid under every frame of a tubelet, divided by their number,
    beside the encoder's own map less its mean over these frames: a still clip looks to it as the
    image did, and what moves shows from the first step.

    Raises:
        UserError: no checkpoint, or another encoder.
    """
    weights, file = encoder_weights(find_checkpoint(run))
    for name in ("encoder", "student"):
        if name in dict(method.named_children()):
            load_inflated(method.get_submodule(name), weights, file)


def load_inflated(encoder: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Load weights; a map of patches of one frame becomes the mean of an own map of several."""
    own = encoder.state_dict()
    for key, value in weights.items():
        if key in own and value.ndim == 2 and own[key].ndim == 2:
            times = own[key].shape[1] // value.shape[1]
            if times > 1 and own[key].shape == (value.shape[0], times * value.shape[1]):
                frames = own[key].unflatten(1, (times, -1))
                inflated = frames - frames.mean(1, keepdim=True) + value.unsqueeze(1) / times
                weights = weights | {key: inflated.flatten(1)}
    load_state(encoder, weights, name)


class Cut(Protocol):
    """The flags that say what a clip is."""

    @property
    def frames(self) -> int:
        """Return the number of frames."""
        ...

    @property
    def fps(self) -> float:
        """Return the frames a second."""
        ...

    @property
    def size(self) -> int:
        """Return the side in pixels."""
        ...


def middles(clips: Clips, flags: Cut) -> tuple[UInt8[np.ndarray, "n t hh ww c"], Clips]:
    """Return the clip in the middle of every video, and the videos: others for unreadable ones."""
    every = np.arange(len(clips))
    pixels, drawn = clips.draw_middle(every, frames=flags.frames, fps=flags.fps, size=flags.size)
    return pixels, clips.take(drawn)


def quick_probe(
    encoder: Encoder, training: Clips, held_out: Clips, flags: ClipFlags
) -> dict[str, float]:
    """Return how well mean tokens tell every label, by k-NN among 2000 videos at most."""
    if not training.classes:
        return {}
    fit, training = middles(some(training, 2000), flags)
    pixels, held_out = middles(held_out, flags)
    fit_z, z = (clip_features(encoder, clips) for clips in (fit, pixels))
    return {
        f"knn_{factor}": accuracy(knn_probe(fit_z, tensor(labels), z), held_out.classes[factor])
        for factor, labels in training.classes.items()
    }


def beside_a_random_encoder(
    encoders: dict[str, Encoder], training: Clips, test: Clips, flags: ClipFlags
) -> dict[str, dict[str, float]]:
    """Print what attentive probes read of every label from each encoder, by up to 1500 videos."""
    if not training.classes:
        return {}
    fit, training = middles(some(training, 1500), flags)
    pixels, test = middles(some(test, 1000), flags)
    rows: dict[str, dict[str, float]] = {}
    for name, encoder in encoders.items():
        fit_z, z = (clip_tokens(encoder, clips) for clips in (fit, pixels))
        rows[name] = {
            factor: accuracy(attentive_probe(fit_z, tensor(labels), z), test.classes[factor])
            for factor, labels in training.classes.items()
        }
    for factor in training.classes:
        words = ", ".join(f"{name} encoder {row[factor]:.3f}" for name, row in rows.items())
        print(f"{factor:>20}: {words} (attentive probe)")
    return rows


def some(clips: Clips, at_most: int) -> Clips:
    """Return evenly chosen videos."""
    return clips.take(np.linspace(0, len(clips) - 1, min(at_most, len(clips))).astype(int))


def accuracy(predicted: Tensor, labels: Int[np.ndarray, " n"]) -> float:
    """Return the share of right predictions."""
    return round(float((predicted.cpu().numpy() == labels).mean()), 4)


def tensor(labels: Int[np.ndarray, " n"]) -> Tensor:
    """Return labels as a tensor."""
    return torch.from_numpy(labels)


def draw_clips(folder: Path, method: IJEPA | TeacherIJEPA, clips: Clips, flags: ClipFlags) -> None:
    """Draw masks and tokens of the first clips over time, as `masks.png` and `tokens.png`."""
    pixels, _ = middles(clips.take(np.arange(min(4, len(clips)))), flags)
    encoder: Any = method.encoder
    turns: Any = method.masks
    for step, kind in enumerate(turns.kinds):
        masks = kind(torch.arange(len(pixels)), step)
        tube_picture(pixels, masks, encoder.grid).savefig(folder / f"masks{step}.png", dpi=120)
    tokens = clip_tokens(encoder, pixels)
    maps = rearrange(tokens, "n (t y x) d -> n t y x d", t=encoder.grid[0], y=encoder.grid[1])
    clip_picture(pixels, maps).savefig(folder / "tokens.png", dpi=120)


def check(config: TrainVjepa) -> None:
    """Check the numbers of a configuration.

    Raises:
        UserError: naming the flag, the number and what is allowed.
    """
    require_at_least(config, steps=1, batch_size=2, log_every=1, checkpoint_every=1)
    require_at_least(config, lr=0, weight_decay=0, seed=0)
    flags = config.clips
    if flags.frames < 1 or flags.size < 8 or not flags.fps > 0 or flags.workers < 0:
        raise UserError(
            f"--clips of {flags.frames} frames, {flags.fps} a second, {flags.size} pixels, by "
            f"{flags.workers} workers: give at least 1, more than 0, 8, and 0"
        )
    if not 0 <= flags.bad_share <= 1 or not flags.patience > 0:
        raise UserError(
            f"--clips.bad-share {flags.bad_share}, --clips.patience {flags.patience}: give a share "
            "in [0, 1], and seconds above 0"
        )
    shares = [share for share, _, _ in flags.stages]
    if any(share <= 0 for share in shares) or sum(shares) > 1:
        raise UserError(f"--clips.stages have the shares {shares}: they add up to 1 at most")
    other = [size for _, _, size in flags.stages if size != flags.size]
    if flags.cache and other:
        raise UserError(
            f"--clips.cache keeps {flags.size} pixels, a stage asks for {other[0]}: drop one"
        )
    if not config.predict.masks:
        raise UserError("--predict.masks: give at least one of short, long and random")
    if not 0 < config.predict.share <= 1:
        raise UserError(f"--predict.share {config.predict.share}: give a share in (0, 1]")
    if config.predict.seen is not None and not 0 < config.predict.seen < 1:
        raise UserError(f"--predict.seen {config.predict.seen}: give a share in (0, 1)")
    if config.teacher == "ema" and not config.predict.stop_gradient:
        raise UserError(
            "--predict.no-stop-gradient: a teacher's targets have no gradient, drop one"
        )
    final = config.predict.final_weight
    if final is not None and config.teacher == "ema":
        raise UserError("--predict.final-weight: a teacher needs no SIGReg, drop one")
    if final is not None and not 0 < final <= config.weights[0]:
        raise UserError(
            f"--predict.final-weight {final}: give one above 0, at most {config.weights[0]}"
        )
    check_objective(config.views, config.weights)
