import pytest
import torch

from jepa_world.methods.decoder import SIDE, Decoder, small


def test_a_decoder_learns_which_picture_a_latent_belongs_to():
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 2, (6, 4, 4, 3), generator=random).mul(255).byte()
    pixels = pixels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    batch = {"latent": torch.eye(6), "pixels": pixels}
    torch.manual_seed(0)
    decoder = Decoder(6, small(pixels).mean(0), hidden=64)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for step in range(200):
        optimizer.zero_grad()
        decoder(batch, step).loss.backward()
        optimizer.step()
    assert decoder(batch, 200).loss < 0.02 * small(pixels).var(0).mean()
    assert ((decoder.draw(torch.eye(6)).int() - pixels.int()).abs() < 100).all()


@pytest.mark.parametrize("shape", [(32, 32, 3), (20, 36, 6), (96, 48, 1), (8, 8, 3)])
def test_pictures_of_any_shape_are_drawn_and_large_ones_small(shape):
    pixels = torch.randint(0, 256, (4, *shape), dtype=torch.uint8)
    mean = small(pixels).mean(0)
    assert mean.shape[0] == shape[2] and max(mean.shape) <= SIDE
    decoder = Decoder(5, mean)
    assert decoder.draw(torch.zeros(4, 5)).shape == (4, *mean.shape[1:], shape[2])
    decoder({"latent": torch.zeros(4, 5), "pixels": pixels}, 0).loss.backward()
