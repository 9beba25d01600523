import colorsys
from typing import Any

import pytest
import torch

from jepa_world.data.augmentation import NUMBERS, Augmentation, random_numbers

WHOLE: dict[str, Any] = {"scale": (1.0, 1.0), "aspect": (1.0, 1.0), "flip": 0.0}


def uniform(count, seed=0):
    return torch.rand(count, NUMBERS, generator=torch.Generator().manual_seed(seed))


def images(count=6, channels=3, height=16, width=16):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, height, width, generator=generator)


def test_a_crop_of_everything_changes_nothing_and_a_flip_mirrors():
    x = images()
    torch.testing.assert_close(Augmentation(**WHOLE)(x, uniform(6)), x)
    flipped = Augmentation(**{**WHOLE, "flip": 1.0})(x, uniform(6))
    torch.testing.assert_close(flipped, x.flip(3))


def test_a_crop_stretches_a_part_of_the_picture_to_all_of_it():
    ramp = (torch.arange(32) + 0.5).div(32).expand(200, 1, 32, 32)
    for low, high in ((0.1, 0.3), (0.5, 1.0)):
        crops = Augmentation(scale=(low, high), aspect=(1.0, 1.0), flip=0.0)
        x = crops(ramp, uniform(200))
        side = (x[:, 0, 5, 24] - x[:, 0, 5, 8]) * 2  # a linear ramp stays linear
        assert low**0.5 - 0.01 < side.min() and side.max() < high**0.5 + 0.01
        assert side.max() - side.min() > 0.8 * (high**0.5 - low**0.5)
        torch.testing.assert_close(x[:, :, :1].expand_as(x), x)


def test_crops_lie_within_the_picture_wherever_it_is_not_square():
    x = torch.ones(100, 1, 10, 24)
    view = Augmentation(scale=(0.05, 1.0), blur=1.0)(x, uniform(100))
    torch.testing.assert_close(view, x)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_every_view_is_a_picture(strength):
    x, views = images(200), Augmentation.of_strength((0.1, 1.0), strength)
    view = views(x, uniform(200))
    assert view.shape == x.shape and view.min() >= 0 and view.max() <= 1
    assert views(images(9, channels=1), uniform(9)).shape == (9, 1, 16, 16)


def test_greying_leaves_the_luminance_and_blur_the_brightness():
    x = images()
    grey = Augmentation(**WHOLE, grey=1.0)(x, uniform(6))
    luminance = (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * x).sum(1, keepdim=True)
    torch.testing.assert_close(grey, luminance.expand_as(x), atol=1e-3, rtol=0)
    blurred = Augmentation(**WHOLE, blur=1.0)(images(height=128, width=128), uniform(6))
    assert (blurred.std((2, 3)) < images(height=128, width=128).std((2, 3)) - 0.02).any()


def test_jitter_turns_the_hue_of_a_colour_and_moves_its_brightness():
    red = torch.tensor([0.6, 0.3, 0.3]).view(1, 3, 1, 1).expand(400, 3, 4, 4)
    view = Augmentation(**WHOLE, jitter=0.4)(red, uniform(400))[:, :, 0, 0]
    hue = torch.tensor([colorsys.rgb_to_hsv(*colour)[0] for colour in view.tolist()])
    hue = (hue + 0.5) % 1 - 0.5
    assert 0.05 < hue.abs().max() < 0.15 and hue.abs().min() < 0.01
    brightness = view @ torch.tensor([0.299, 0.587, 0.114]) / (0.299 * 0.6 + 0.701 * 0.3)
    assert 0.55 < brightness.min() < 0.7 and 1.3 < brightness.max() < 1.5


def test_solarising_inverts_what_is_bright():
    x = images()
    expected = torch.where(x > 0.5, 1 - x, x)
    torch.testing.assert_close(Augmentation(**WHOLE, solarise=1.0)(x, uniform(6)), expected)


def test_numbers_of_a_sample_depend_on_seed_step_and_sample_alone():
    whole = random_numbers(torch.tensor([4, 7, 9]), views=2, seed=3, step=5)
    assert whole.shape == (2, 3, NUMBERS) and whole.unique().numel() == whole.numel()
    part = random_numbers(torch.tensor([9, 4]), views=2, seed=3, step=5)
    torch.testing.assert_close(part, whole[:, [2, 0]], rtol=0, atol=0)
    for other in ({"seed": 4, "step": 5}, {"seed": 3, "step": 6}):
        assert (random_numbers(torch.tensor([4, 7, 9]), views=2, **other) != whole).all()


def test_a_view_does_not_depend_on_the_batch_around_it():
    x, numbers = images(), uniform(6)
    views = Augmentation.of_strength((0.1, 1.0), 1.0)
    torch.testing.assert_close(views(x[2:4], numbers[2:4]), views(x, numbers)[2:4])
