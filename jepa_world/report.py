"""What a run shows a person: a video, a still picture and one self-contained HTML page."""

import base64
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from jepa_world.agent import Agent
from jepa_world.data.video import write_video
from jepa_world.evaluation import Episode, Frame
from jepa_world.methods.world_model import WorldModel
from jepa_world.pictures import in_colour


class FrameBank:
    """Frames of an environment and their latents: shows a latent by the frame nearest to it."""

    def __init__(self, frames: UInt8[np.ndarray, "n hh ww c"], z: Float[Tensor, "n d"]) -> None:
        self.frames = frames
        self.z = z

    @classmethod
    @torch.inference_mode()
    def of(cls, env: gym.Env[Any, Any], model: WorldModel, *, resets: int = 300) -> "FrameBank":
        """Fill a bank with the starts and goals of many resets."""
        pairs = [env.reset(seed=seed) for seed in range(resets)]
        frames = np.stack([frame for seen, info in pairs for frame in (seen, info["goal"])])
        z = model.encode(torch.from_numpy(frames)[:, None])
        return cls(frames, z.flatten(1))

    def nearest(self, z: Float[Tensor, "n d"]) -> Frame:
        """Return the frame whose latent is nearest."""
        return self.frames[int((self.z - z.flatten()).square().sum(1).argmin())]


@dataclass(frozen=True)
class Film:
    """What one episode looked like, and what the agent imagined at every step of it."""

    episode: Episode
    goal: Frame
    seen: list[Frame]
    imagined: list[Frame]


class Camera:
    """Watches an agent in one episode."""

    def __init__(self, bank: FrameBank, agent: Agent) -> None:
        self.bank, self.agent = bank, agent
        self.seen: list[Frame] = []
        self.imagined: list[Frame] = []

    @torch.no_grad()
    def watch(self, observation: Frame) -> None:
        """Record an observation, and the frame nearest to where the present plan is to end."""
        self.seen.append(observation)
        imagined = self.agent.cost.imagine(self.agent.plan[:, None])
        self.imagined.append(self.bank.nearest(imagined[0, 0, -1]))


def write_report(folder: Path, results: dict[str, Any], films: list[Film]) -> None:
    """Write plan.mp4, plan.png and report.html."""
    frames = [_panels(film, step) for film in films for step in range(len(film.seen))]
    write_video(folder / "plan.mp4", np.stack(frames), fps=8)
    _still(films[:3], results["tolerance"]).savefig(folder / "plan.png")
    (folder / "report.html").write_text(_page(folder, results), encoding="utf-8")


def _panels(film: Film, step: int, *, size: int = 256) -> UInt8[np.ndarray, "hh ww c"]:
    """Draw one video frame: goal, what happened, what the plan imagines, with the distance."""
    pictures = (film.goal, film.seen[step], film.imagined[step])
    distance = film.episode.distances[step]
    titles = ("goal", f"step {step}: {distance:.3f} from the goal", "the plan's end, imagined")
    rows, columns = in_colour(film.goal).shape[:2]
    width = size * columns // rows
    canvas = Image.new("RGB", (3 * width, size + 24), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        image = Image.fromarray(in_colour(picture)).resize((width, size), Image.Resampling.NEAREST)
        canvas.paste(image, (column * width, 24))
        draw.text((column * width + 6, 6), title, fill="black")
    return np.asarray(canvas)


def _still(films: list[Film], tolerance: float) -> Figure:
    """Draw a row an episode: the goal, moments of what happened, and the distance over time."""
    last = len(films[0].seen) - 1
    moments = sorted({0, last // 6, last // 3, last // 2, last})
    rows, columns = in_colour(films[0].goal).shape[:2]
    wide = (len(moments) + 1) * columns / rows + 1.4
    figure = Figure(figsize=(2 * wide, 2.1 * len(films)), layout="constrained")
    widths = [columns / rows] * (len(moments) + 1) + [1.4]
    axes = figure.subplots(len(films), len(widths), squeeze=False, width_ratios=widths)
    for row, film in zip(axes, films, strict=True):
        shown = [("goal", film.goal)] + [(f"step {m}", film.seen[m]) for m in moments]
        for axis, (title, picture) in zip(row, shown, strict=False):
            axis.imshow(in_colour(picture))
            axis.set_title(title, fontsize=9)
            axis.axis("off")
        row[-1].plot(film.episode.distances, color="tab:blue")
        row[-1].axhline(tolerance, color="tab:green", linewidth=0.8, linestyle="--")
        row[-1].set_title("distance to the goal", fontsize=9)
        row[-1].set_ylim(bottom=0)
        row[-1].tick_params(labelsize=7)
    return figure


def _page(folder: Path, results: dict[str, Any]) -> str:
    """Return an HTML page that holds the numbers, the picture and the video in itself."""
    video, picture = (
        base64.b64encode((folder / name).read_bytes()).decode() for name in ("plan.mp4", "plan.png")
    )
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td><code>{escape(json.dumps(value))}</code></td></tr>"
        for key, value in results.items()
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>jepa-world plan</title>
<style>body{{font:15px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}}
img,video{{max-width:100%}}th{{text-align:left;vertical-align:top;padding-right:1rem}}
td{{overflow-wrap:anywhere}}</style>
<h1>Planning in latent space: {escape(str(results["env"]))}</h1>
<p>Left: the goal. Middle: what happened. Right: the frame nearest to the latent that the present
plan is predicted to end in.</p>
<video controls autoplay muted loop src="data:video/mp4;base64,{video}"></video>
<img alt="episodes and distances" src="data:image/png;base64,{picture}">
<table>{rows}</table></html>
"""
