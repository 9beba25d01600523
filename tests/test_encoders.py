from typing import Any

import pytest
import torch

from jepa_world.encoders.conv import ConvEncoder
from jepa_world.encoders.vit import PooledViTEncoder, ViTEncoder
from jepa_world.testing import check_encoder

FRAME = (1, 3, 32, 32)
SMALL_VIT: dict[str, Any] = {"depth": 2, "heads": 2}


@pytest.mark.parametrize(
    ("encoder", "shape"),
    [
        (ConvEncoder(FRAME), FRAME),
        (ConvEncoder((1, 6, 40, 56), dim=8, width=4, hidden=16), (1, 6, 40, 56)),
        (ConvEncoder((1, 6, 40, 56), dim=8, width=4, hidden=16, patches=True), (1, 6, 40, 56)),
        (ViTEncoder(FRAME, dim=64, **SMALL_VIT), FRAME),
        (ViTEncoder((4, 3, 16, 24), tubelet=2, dim=64, **SMALL_VIT), (4, 3, 16, 24)),
        (ViTEncoder(FRAME, dim=64, positions="rotary", **SMALL_VIT), FRAME),
        (
            ViTEncoder((4, 3, 16, 24), tubelet=2, dim=64, positions="rotary", **SMALL_VIT),
            (4, 3, 16, 24),
        ),
        (
            ViTEncoder((4, 6, 16, 24), tubelet=2, dim=64, stem=4, **SMALL_VIT),
            (4, 6, 16, 24),
        ),
        (PooledViTEncoder(FRAME, width=64, **SMALL_VIT), FRAME),
    ],
    ids=[
        *("conv", "conv-mlp", "conv-patches", "vit", "vit-clip", "vit-rotary", "vit-rotary-clip"),
        *("vit-stem", "vit-pooled"),
    ],
)
def test_encoder_keeps_its_contract(encoder, shape):
    check_encoder(encoder, shape)


def test_conv_takes_bytes_as_they_lie_in_memory():
    encoder = ConvEncoder(FRAME).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32, 3), dtype=torch.uint8)
    view = pixels.permute(0, 1, 4, 2, 3) / 255
    torch.testing.assert_close(encoder(view), encoder(view.contiguous()), atol=1e-5, rtol=1e-5)


def test_conv_makes_a_token_of_every_place_in_raster_order():
    encoder = ConvEncoder((1, 3, 32, 64), stages=3, patches=True).eval()
    video = torch.rand(2, 3, 3, 32, 64)
    assert encoder(video).shape == (2, 3, 4 * 8, 32)
    other = video.clone()
    other[..., :4, -4:] = 0  # seen by the last place of the first row and its neighbours
    moved = (encoder(other) - encoder(video)).abs().amax((0, 1, 3)).unflatten(0, (4, 8))
    assert moved[0, 7] > 1e-4 and moved[2:].max() < 1e-6 and moved[:, :6].max() < 1e-6


def test_conv_latents_of_a_batch_have_mean_zero_and_variance_one():
    z = ConvEncoder(FRAME, dim=8)(torch.rand(16, 4, 3, 32, 32)).flatten(0, 2)
    torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(8), atol=1e-2, rtol=0)


def test_conv_under_bfloat16_autocast_still_gives_float32_latents():
    encoder, video = ConvEncoder(FRAME).eval(), torch.rand(4, 2, 3, 32, 32)
    full = encoder(video)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(video)
    torch.testing.assert_close(half, full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("stem", [0, 4])
def test_vit_computes_kept_tokens_from_their_own_pixels_only(stem):
    encoder = ViTEncoder(FRAME, dim=64, stem=stem, **SMALL_VIT).eval()
    video, keep = torch.rand(2, *FRAME), torch.tensor([[0, 1, 4], [5, 0, 1]])
    changed = video.clone()
    changed[..., 16:, :] = 0.0  # patches 8 to 15
    torch.testing.assert_close(encoder(changed, keep=keep), encoder(video, keep=keep))


def test_vit_with_rotary_positions_sees_a_frame_as_the_first_of_a_clip():
    options: dict[str, Any] = SMALL_VIT | {"dim": 64, "positions": "rotary"}
    image, clip = (ViTEncoder((t, 3, 16, 24), **options).eval() for t in (1, 3))
    image.load_state_dict(clip.state_dict())
    video, first = torch.rand(2, 3, 3, 16, 24), torch.arange(6).expand(2, -1)
    torch.testing.assert_close(clip(video, keep=first), image(video[:, :1])[:, 0])


def test_vit_with_rotary_positions_under_autocast_keeps_whole_sums():
    encoder = ViTEncoder(FRAME, dim=64, positions="rotary", **SMALL_VIT).eval()
    video = torch.rand(2, *FRAME)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(video)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, encoder(video), atol=0.05, rtol=0.05)


def test_vit_giant_is_that_of_v_jepa_2():
    with torch.device("meta"):
        encoder = ViTEncoder((16, 3, 256, 256), size="giant", patch=16, tubelet=2, depth=1)
    assert encoder.state_dict()["blocks.0.mlp.0.weight"].shape == (6144, 1408)


def test_vit_positions_tell_equal_patches_apart():
    z = ViTEncoder(FRAME, dim=64, **SMALL_VIT)(torch.full((1, *FRAME), 0.5))
    assert len(z[0, 0].unique(dim=0)) == 16


def test_vit_of_a_clip_mixes_frames_and_of_single_frames_does_not():
    video = torch.rand(1, 4, 3, 16, 16)
    changed = video.clone()
    changed[:, 3] = 0.0
    for frames, mixes in ((4, True), (1, False)):
        encoder = ViTEncoder((frames, 3, 16, 16), dim=64, **SMALL_VIT)
        assert torch.equal(encoder(changed)[:, 0], encoder(video)[:, 0]) != mixes


def test_vit_names_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match=r"1 x 30 x 32 .* patches of 1 x 8 x 8"):
        ViTEncoder((1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"3 x 32 x 32 .* patches of 2 x 8 x 8"):
        ViTEncoder((3, 3, 32, 32), tubelet=2)
    with pytest.raises(ValueError, match="a stem takes patches of 8, 16, 32"):
        ViTEncoder((1, 3, 24, 24), patch=12, stem=4)
    with pytest.raises(ValueError, match="built for clips of 4 frames, got 6"):
        ViTEncoder((4, 3, 16, 16), dim=64, **SMALL_VIT)(torch.rand(1, 6, 3, 16, 16))


def test_conv_names_a_frame_that_is_too_small():
    with pytest.raises(ValueError, match="12 x 64 pixels is too small for 4 halvings"):
        ConvEncoder((1, 3, 12, 64))
