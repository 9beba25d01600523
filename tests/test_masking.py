import numpy as np
import pytest
import torch

from jepa_world.masking import MultiBlockMasks, RandomMasks

GRIDS = [(1, 7, 7), (1, 14, 10), (4, 6, 6)]
KINDS = [MultiBlockMasks, RandomMasks]
SAMPLES = torch.arange(4000)


def frequency(index, length):
    """Return how often each token is in a mask."""
    return torch.bincount(index.flatten(), minlength=length) / len(index)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_disjoint_sets_of_the_lengths_asked_for(kind, grid):
    length = int(np.prod(grid))
    context, target = kind(grid, context=0.3, target=0.6)(torch.arange(50), step=0)
    assert context.shape == (50, round(0.3 * length)) and target.shape == (50, round(0.6 * length))
    both = torch.cat([context, target], 1).sort(1).values
    assert bool((both.diff(dim=1) > 0).all()) and 0 <= both.min() and both.max() < length
    assert bool((context.diff(dim=1) > 0).all()) and bool((target.diff(dim=1) > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_depends_on_seed_step_and_sample_alone(kind):
    masks = kind((1, 7, 7), seed=3)
    whole = masks(torch.arange(12), step=5)
    apart = [masks(part, step=5) for part in torch.arange(12).split(4)]
    for one, parts in zip(whole, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(one, torch.cat(parts), atol=0, rtol=0)
    assert len(torch.cat([whole.target, masks(torch.arange(12), 6).target]).unique(dim=0)) == 24
    assert not torch.equal(whole.target, kind((1, 7, 7), seed=4)(torch.arange(12), 5).target)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_position_is_favoured(kind, grid):
    """Published samplers never make the last row a target, and keep a top patch 20 times more."""
    length = int(np.prod(grid))
    masks = kind(grid, context=0.3, target=0.5)(SAMPLES, step=0)
    for index in masks:
        share = frequency(index, length)
        assert (share / share.mean() - 1).abs().max() < 0.13  # of 4000 fair draws: 0.06


def test_targets_are_blocks_and_random_ones_are_not():
    def neighbours(index):
        """Return the share of targets whose right neighbour is a target as well."""
        board = torch.zeros(len(index), 196).scatter(1, index, 1.0).view(-1, 14, 14)
        return ((board[..., :-1] * board[..., 1:]).sum() / board[..., :-1].sum()).item()

    blocks = neighbours(MultiBlockMasks((1, 14, 14), target=0.3)(SAMPLES[:500], 0).target)
    scattered = neighbours(RandomMasks((1, 14, 14), target=0.3)(SAMPLES[:500], 0).target)
    assert blocks > 0.75 and scattered == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_of_a_clip_are_tubes_and_all_times_are_alike(kind):
    masks = kind((8, 7, 7), context=0.1, target=0.5)(SAMPLES[:300], step=0)
    board = torch.zeros(300, 8 * 49).scatter(1, masks.target, 1.0).view(300, 8, 49)
    whole = (board.sum(1) == 8).float().mean().item()
    assert whole > 0.4  # of 0.5: the last block or tube is thinned
    times = frequency(masks.target // 49, 8) / 49
    assert (times - 0.5).abs().max() < 0.02


def test_a_context_is_drawn_evenly_from_what_is_no_target():
    masks = MultiBlockMasks((1, 14, 14), context=0.2, target=0.5)(SAMPLES, step=0)
    rows = frequency(masks.context // 14, 14)
    assert rows.max() / rows.min() < 1.1


@pytest.mark.parametrize("shares", [(0.6, 0.5), (0.0, 0.5), (0.5, 0.001)])
@pytest.mark.parametrize("kind", KINDS)
def test_shares_that_do_not_fit_are_refused(kind, shares):
    with pytest.raises(ValueError, match="on a grid of 49: each needs one, and together at most"):
        kind((1, 7, 7), context=shares[0], target=shares[1])
