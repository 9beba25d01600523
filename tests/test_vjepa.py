import math
from typing import Any

import numpy as np
import pytest
import torch

from jepa_world.commands.train_vjepa import load_inflated
from jepa_world.encoders.vit import ViTEncoder
from jepa_world.masking import Masks
from jepa_world.methods.ijepa import fitted
from jepa_world.methods.vjepa import build_vjepa, tube_masks
from jepa_world.registry import UserError

DESCRIPTION = {
    "observation_shape": [4, 3, 16, 16],
    "encoder": {
        **{"name": "vit", "patch": 4, "tubelet": 2, "dim": 32, "depth": 1, "heads": 2},
        **{"positions": "rotary", "standardise": True},
    },
    "masked_predictor": {"name": "cross", "width": 16, "depth": 1, "heads": 1},
    "masks": ["short", "long"],
    "predict": 1.0,
    "views": {"crop": 0.7, "colour": 0.5},
    "whole": 1.0,
    "distance": "l2",
    "teacher": None,
    "sigreg": {"slices": 32, "seed": 0, "weight": 10.0},
}
TEACHER = DESCRIPTION | {"teacher": {"momentum": 0.9, "steps": 10}, "distance": "l1"}
GRID = (4, 6, 6)


def batch(*shape, count=16):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, *shape, 3), dtype=torch.uint8, generator=generator)
    return {"pixels": pixels, "index": torch.arange(count)}


def built(description) -> Any:
    torch.manual_seed(0)
    return build_vjepa(description)


@pytest.mark.parametrize("kind", ["short", "long", "random"])
def test_every_token_is_seen_or_predicted_and_no_frame_is_favoured(kind):
    masks = tube_masks((kind,), GRID)(torch.arange(400), 0)
    both = torch.cat(masks, 1).sort(1).values
    assert torch.equal(both, torch.arange(math.prod(GRID)).expand(400, -1))
    frames = torch.bincount((masks.target // 36).flatten(), minlength=4) / masks.target.numel()
    torch.testing.assert_close(frames, torch.full((4,), 0.25), atol=0.005, rtol=0)


@pytest.mark.parametrize("kind", ["short", "long", "random"])
def test_a_tube_goes_through_all_frames(kind):
    """A place is hidden in every frame or in none, but for the one that evens the lengths."""
    target = tube_masks((kind,), GRID)(torch.arange(50), 0).target
    hidden = torch.zeros(50, 4 * 36).scatter(1, target, 1.0).view(50, 4, 36).sum(1)
    assert (((hidden > 0) & (hidden < 4)).sum(1) <= 1).all()


def test_the_share_that_is_seen_can_be_chosen():
    masks = tube_masks(("random", "long"), (8, 1, 1), seen=0.75)
    for step in range(2):
        drawn = masks(torch.arange(3), step)
        assert drawn.context.shape == (3, 6) and drawn.target.shape == (3, 2)


@pytest.mark.parametrize("stop", [True, False])
def test_a_gradient_reaches_the_targets_when_it_is_not_stopped(stop):
    method = built(DESCRIPTION | {"stop_gradient": stop, "views": {"crop": 1.0, "colour": 0.0}})
    clips = torch.rand(4, 4, 3, 16, 16)
    masks = tube_masks(("short",), method.encoder.grid)(torch.arange(4), 0)
    tokens, mean = method.targets(clips, masks)
    assert tokens.requires_grad is mean.requires_grad is not stop
    with torch.no_grad():
        same, _ = method.targets(clips, masks)
    torch.testing.assert_close(tokens.detach(), same)
    assert not same.requires_grad


def test_the_weight_of_sigreg_falls_geometrically():
    fall = DESCRIPTION["sigreg"] | {"final_weight": 0.1, "steps": 10}
    constant, falling = built(DESCRIPTION), built(DESCRIPTION | {"sigreg": fall})
    for step, weight in ((0, 10.0), (5, 1.0), (10, 0.1), (20, 0.1)):
        whole, other = (method(batch(4, 16, 16), step) for method in (constant, falling))
        expected = whole.loss + (weight - 10.0) * whole.terms["sigreg"]
        torch.testing.assert_close(other.loss, expected)


def test_kinds_of_masks_take_turns():
    masks = tube_masks(("short", "long"), GRID)
    shares = [masks(torch.arange(2), step).context.shape[1] for step in range(4)]
    assert shares == [36, 14, 36, 14]


@pytest.mark.parametrize("description", [DESCRIPTION, TEACHER])
@pytest.mark.parametrize("shape", [(4, 16, 16), (2, 16, 16), (6, 24, 24), (16, 16)])
def test_clips_of_any_shape_and_images_train_the_same_weights(description, shape):
    method = built(description)
    output = method(batch(*shape), step=0)
    assert output.loss.isfinite()
    output.loss.backward()
    trained = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


def test_the_method_for_another_shape_holds_the_same_parameters():
    method = built(DESCRIPTION)
    other = fitted(method, batch(2, 24, 24)["pixels"])
    assert other.encoder.grid == (1, 6, 6) and method.encoder.grid == (2, 4, 4)
    for own, its in zip(method.parameters(), other.parameters(), strict=True):
        assert own is its


def test_parts_for_one_shape_only_say_so():
    method = built(DESCRIPTION)
    method._modules["encoder"] = torch.nn.Identity()
    with pytest.raises(ValueError, match="encoder has no `for_clips`"):
        method(batch(2, 16, 16), step=0)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_an_encoder_started_from_images_sees_an_image_as_before(positions):
    how = {"patch": 4, "dim": 32, "depth": 2, "heads": 2, "positions": positions}
    of_images = ViTEncoder((1, 3, 16, 16), **how).eval()
    of_clips = ViTEncoder((4, 3, 16, 16), tubelet=2, **how).eval()
    load_inflated(of_clips, of_images.state_dict(), "images")
    image = torch.rand(2, 1, 3, 16, 16)
    seen = of_clips.for_clips((1, 3, 16, 16))(image)
    torch.testing.assert_close(seen, of_images(image))
    if positions == "rotary":  # a still clip's first step has the same places
        first = torch.arange(16).expand(2, -1)
        still = of_clips(image.expand(-1, 4, -1, -1, -1), keep=first)
        torch.testing.assert_close(still, of_images(image)[:, 0])


def test_a_target_does_not_depend_on_the_other_targets_of_the_cheap_predictor():
    method = built(DESCRIPTION)
    z, seen = torch.randn(2, 5, 32), torch.arange(5).expand(2, -1)
    all_of_them, one = torch.arange(8, 20).expand(2, -1), torch.full((2, 1), 11)
    whole, alone = (method.predictor(z, seen, asked) for asked in (all_of_them, one))
    torch.testing.assert_close(whole[:, 3:4], alone)


def test_views_of_a_clip_cut_and_colour_all_frames_alike():
    method = built(DESCRIPTION)
    still = torch.randint(0, 256, (8, 1, 16, 16, 3), dtype=torch.uint8).expand(-1, 4, -1, -1, -1)
    seen = []
    encode = method.encoder.forward
    method.encoder.forward = lambda video, keep=None: seen.append(video) or encode(video, keep)
    method({"pixels": still, "index": torch.arange(8)}, step=0)
    for clip in seen:
        torch.testing.assert_close(clip, clip[:, :1].expand_as(clip))
    assert (seen[0] - seen[1]).abs().mean() > 0.01


@pytest.mark.parametrize("description", [DESCRIPTION, TEACHER])
def test_a_stopped_run_goes_on_exactly(description, resumes_exactly):
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (40, 4, 16, 16, 3), dtype=np.uint8))
    resumes_exactly(lambda: built(description), pixels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"masks": ["tall"]}, "tall"),
        ({"views": {}}, "not the description of V-JEPA"),
        ({"observation_shape": [4, 3, 16]}, "not the description of V-JEPA"),
        ({"encoder": {"name": "conv"}}, "has no `grid`"),
        (
            {"sigreg": DESCRIPTION["sigreg"] | {"final_weight": "low"}},
            "not the description of V-JEPA",
        ),
        (
            {"sigreg": DESCRIPTION["sigreg"] | {"final_weight": 0.1, "weight": 0.0}},
            "final_weight 0.1 is not above 0",
        ),
        ({"observation_shape": [2, 3, 4, 4]}, "masks of"),
    ],
)
def test_a_wrong_description_is_one_line(change, words):
    with pytest.raises(UserError, match=words):
        built(DESCRIPTION | change)


def test_masks_are_of_samples_and_steps_alone():
    masks = tube_masks(("short", "long"), GRID, seed=3)
    whole, part = masks(torch.arange(8), 5), masks(torch.tensor([6, 2]), 5)
    assert isinstance(whole, Masks)
    torch.testing.assert_close(whole.target[[6, 2]], part.target)


def test_targets_see_their_group_only():
    """460 targets are two groups in the order of time: the cost is not their square."""
    shape = [8, 3, 32, 32]
    encoder = DESCRIPTION["encoder"] | {"tubelet": 1, "standardise": False}
    method = built(DESCRIPTION | {"observation_shape": shape, "encoder": encoder})
    masks = tube_masks(("long",), method.encoder.grid)(torch.tensor([3, 3]), 0)
    early, late = masks.target.chunk(2, 1)
    assert masks.target.shape[1] > 256 and early.shape[1] <= 256 and (late >= 64).all()
    video = torch.rand(2, *shape)
    changed = video.clone()
    changed[:, 0] = torch.rand(2, 3, 32, 32)  # the first frame, which no late group holds
    one, two = (method.targets(clips, masks)[0] for clips in (video, changed))
    torch.testing.assert_close(one[:, -late.shape[1] :], two[:, -late.shape[1] :])
    assert (one[:, : early.shape[1]] - two[:, : early.shape[1]]).abs().max() > 0.1
