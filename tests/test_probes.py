import numpy as np
import pytest
import torch

from jepa_world.encoders.conv import ConvEncoder
from jepa_world.encoders.vit import ViTEncoder
from jepa_world.probes import (
    attentive_r2,
    collapse_report,
    effective_rank,
    few_shot,
    fit_logistic,
    image_features,
    knn_probe,
    lidar,
    linear_probe,
    linear_probe_r2,
    linear_read_out,
    mlp_read_out,
    placed_r2,
    r_squared,
    spearman,
    whiten,
)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_effective_rank_counts_equal_singular_values():
    basis = torch.linalg.qr(normal(40, 8)).Q
    assert effective_rank(basis) == pytest.approx(8)
    assert effective_rank(100 * basis[:, :3]) == pytest.approx(3)
    assert effective_rank(basis.T) == pytest.approx(8)
    assert effective_rank(torch.ones(30, 5)) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.zeros(30, 5)) == 0.0


def test_effective_rank_is_the_entropy_of_the_singular_values():
    singular = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    left, right = (torch.linalg.qr(normal(n, 4).double()).Q for n in (20, 6))
    p = singular / singular.sum()
    expected = torch.exp(-(p * p.log()).sum()).item()
    assert effective_rank(left * singular @ right.T) == pytest.approx(expected)


def test_healthy_features_have_no_warning():
    for n in (64, 5000):
        report = collapse_report(normal(n, 32))
        assert report["warning"] == ""
        assert abs(report["sigreg_excess"]) < 0.3
        assert report["effective_rank"] > 20
        assert 0.5 < report["smallest_std"] <= report["largest_std"] < 1.5


@pytest.mark.parametrize(
    ("z", "words"),
    [
        (1e-3 * normal(256, 32) + 1, "collapsed to a point"),
        (100 * normal(256, 32), "blow up"),
        (normal(256, 32) + 300, "blow up"),
        (normal(256, 2) @ normal(2, 32), "few dimensions: effective rank"),
        (normal(256, 32) * (torch.arange(32) > 3), "dimensions are dead"),
        (normal(256, 32).log(), "not finite"),
        (normal(1, 32), "too few"),
    ],
    ids=["point", "large", "far", "plane", "dead", "nan", "one"],
)
def test_sick_features_are_described_in_words(z, words):
    report = collapse_report(z)
    assert words in report["warning"]


def test_report_takes_narrow_formats_and_leaves_no_graph():
    z = normal(128, 16).bfloat16().requires_grad_()
    report = collapse_report(z)
    assert report["warning"] == "" and z.grad is None


def blobs(count, *, classes=4, dim=6, apart=3.0, seed=0):
    """Return Gaussian blobs around `classes` random centres, and their classes."""
    centres = apart * torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    return centres[labels] + torch.randn(count, dim, generator=random), labels


@pytest.mark.parametrize("dim", [6, 60])
def test_logistic_regression_is_the_one_of_scikit_learn(dim):
    """With more samples than features and with fewer, for several decays at once."""
    from sklearn.linear_model import LogisticRegression

    x, y = blobs(500 if dim == 6 else 40, dim=dim, apart=0.7)
    x = x @ normal(dim, dim)  # correlated
    decays = [1e-3, 1e-1]
    for weights, decay in zip(fit_logistic(x, y, decays=decays), decays, strict=True):
        theirs = LogisticRegression(C=1 / (decay * len(x)), tol=1e-8, max_iter=5000).fit(x, y)
        expected = torch.from_numpy(theirs.predict_proba(x)).float()
        found = torch.softmax(x @ weights[:, :-1].T + weights[:, -1], 1)
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_probes_read_separable_classes_whatever_the_scale_of_the_features():
    scales = torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 0.0])
    (fit_z, fit_y), (z, y) = blobs(400), blobs(300, seed=1)
    for probe in (linear_probe, knn_probe):
        assert (probe(fit_z, fit_y, z) == y).float().mean() > 0.95
    assert (linear_probe(fit_z * scales, fit_y, z * scales) == y).float().mean() > 0.9


def test_few_samples_of_many_features_choose_a_strong_decay():
    (fit_z, fit_y), (z, y) = blobs(90, dim=60, apart=0.3), blobs(900, dim=60, apart=0.3, seed=1)
    strong, weak, chosen = (
        float((told == y).float().mean())
        for told in (
            linear_probe(fit_z, fit_y, z, decays=[0.1]),
            linear_probe(fit_z, fit_y, z, decays=[1e-5]),
            linear_probe(fit_z, fit_y, z),
        )
    )
    assert strong > weak + 0.02
    assert chosen > weak + 0.01


def test_nearest_neighbours_vote_and_the_nearer_ones_win_a_tie():
    fit_z = torch.tensor([[1.0, 0.1], [1.0, 0.4], [-1.0, 0.2], [0.1, 1.0], [-1.1, -1.7]])
    fit_y = torch.tensor([0, 0, 1, 1, 2])  # the mean is zero
    z = torch.tensor([[2.0, 0.4], [-3.0, 0.5]])
    assert knn_probe(fit_z, fit_y, z, k=1).tolist() == [0, 1]
    assert knn_probe(fit_z, fit_y, z, k=2, block=1).tolist() == [0, 1]
    assert knn_probe(fit_z, fit_y, z, k=99).shape == (2,)


def test_whitened_features_have_no_correlation_and_dead_ones_stay_small():
    z = normal(500, 6) @ normal(6, 6) * 100 + 7
    z[:, 0] = 3.0
    fit, other = whiten(z, z[:9])
    torch.testing.assert_close(fit[:9], other)
    variances = torch.linalg.eigvalsh(fit.T @ fit / len(fit))
    assert variances[0] < 0.01 and (variances[1:] - 1).abs().max() < 0.05


def test_features_of_cells_keep_their_places():
    encoder = ViTEncoder((1, 1, 16, 16), patch=4, dim=8, depth=1, heads=2)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8)
    mean, parts = (image_features(encoder, pixels, cells=cells) for cells in (1, 2))
    assert parts.shape == (5, 32)
    torch.testing.assert_close(parts.view(5, 8, 4).mean(2), mean)
    tokens = encoder(torch.from_numpy(pixels).float().permute(0, 3, 1, 2)[:, None] / 255)
    top_left = tokens[:, 0].view(5, 4, 4, 8)[:, :2, :2].mean((1, 2))
    torch.testing.assert_close(parts.view(5, 8, 4)[:, :, 0], top_left)


def test_few_shots_are_drawn_anew_and_more_of_them_tell_more():
    (fit_z, fit_y), (z, y) = blobs(400, apart=1.0), blobs(300, apart=1.0, seed=1)
    one, ten = (few_shot(fit_z, fit_y, z, y, shots=shots, draws=5) for shots in (1, 10))
    assert len(set(one)) > 1 and sum(ten) > sum(one)
    assert one == few_shot(fit_z, fit_y, z, y, shots=1, draws=5)


def test_lidar_counts_the_directions_that_tell_images_apart():
    means, noise = normal(300, 1, 8) * torch.tensor([1.0] * 5 + [0.0] * 3), normal(300, 10, 8)
    assert lidar(means + 0.1 * noise) == pytest.approx(5, abs=0.2)
    assert lidar(means.expand(-1, 10, -1)[..., :5]) == pytest.approx(5, abs=0.2)
    turn = torch.linalg.qr(normal(8, 8)).Q
    spread = noise * torch.linspace(0.1, 2, 8)
    assert lidar((means + spread) @ turn) == pytest.approx(lidar(means + spread), rel=1e-3)


def test_features_of_images_do_not_depend_on_the_batch_they_are_read_in():
    encoder = ConvEncoder((1, 1, 16, 24), dim=8, width=4, stages=2).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 16, 24, 1), np.uint8)
    z = image_features(encoder, pixels)
    assert z.shape == (7, 8)
    torch.testing.assert_close(image_features(encoder, pixels, batch_size=3), z)


@pytest.mark.parametrize("dim", [6, 60])
def test_a_read_out_of_numbers_is_the_ridge_regression_of_scikit_learn(dim):
    """With more samples than features and with fewer: it does not explode."""
    from sklearn.linear_model import RidgeCV

    z = normal(340, dim) @ torch.linspace(0.01, 3, dim).diag() @ normal(dim, dim)
    y = torch.stack([z[:, 0] - z[:, 3], z[:, 1] + 3 * normal(340)], 1).double()
    fit, judged = slice(0, 40), slice(40, 340)
    fit_x, x = (
        ((z - z[fit].mean(0)) / z[fit].std(0))[part].double().numpy() for part in (fit, judged)
    )
    for target, found in enumerate(linear_probe_r2(z[fit], y[fit], z[judged], y[judged])):
        theirs = RidgeCV(alphas=40 * np.logspace(-8, 1, 10)).fit(fit_x, y[fit, target].numpy())
        expected = theirs.score(x, y[judged, target].numpy())
        assert found == pytest.approx(expected, abs=1e-6)
        assert expected > 0.1


def test_a_read_out_of_features_of_which_some_are_dead_or_double_is_that_of_the_others():
    """A dead feature changes nothing; a double one halves the decay of the direction it is in."""
    z, dead = normal(300, 4), torch.zeros(300, 9)
    dead[:, [0, 3, 5, 8]] = z
    double = dead.clone()
    double[:, 6] = z[:, 1]
    y = torch.stack([z[:, 0] - 2 * z[:, 3], z[:, 1] + normal(300)], 1)
    expected, found, doubled = (
        linear_probe_r2(x[:200], y[:200], x[200:], y[200:]) for x in (z, dead, double)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(doubled[0], expected[0])
    torch.testing.assert_close(doubled[1], expected[1], atol=1e-3, rtol=0)
    assert found[0] == pytest.approx(1) and 0.2 < found[1] < 0.9


def test_an_attentive_read_out_finds_the_token_that_holds_the_number():
    """The mean token says little: other tokens hold numbers too, of which nothing is asked."""
    z, each = normal(1300, 4, 8), torch.arange(1300)
    z[..., 0] = 0.0
    z[each, each % 4, 0] = 3.0
    y = z[each, each % 4, 1:3].double()
    sets = z[:1200], y[:1200], z[1200:], y[1200:]
    assert (attentive_r2(*sets, heads=1, epochs=40) > 0.7).all()
    assert (linear_probe_r2(*(x.mean(1) if x.ndim == 3 else x for x in sets)) < 0.5).all()
    assert torch.equal(attentive_r2(*sets, epochs=1), attentive_r2(*sets, epochs=1))
    assert (attentive_r2(sets[0].flip(0), *sets[1:], epochs=1) < 0.1).all()


def test_tokens_are_read_by_their_places_where_nothing_in_them_tells_these():
    z = normal(1300, 4, 3)
    y = (z[:, 2, :2] + z[:, 1, 1:] ** 2).double()
    sets = z[:1200], y[:1200], z[1200:], y[1200:]
    assert (placed_r2(*sets) > 0.8).all()
    assert (attentive_r2(*sets, heads=1, epochs=5) < 0.5).all()
    assert (placed_r2(*sets[:2], z[1200:].flip(1), y[1200:]) < 0.3).all()


def test_what_hardly_varies_in_a_few_tokens_does_not_outweigh_the_rest():
    common = normal(1300, 1, 1)
    z = common + 0.05 * normal(1300, 5, 8)
    y = torch.sin(3 * common[:, 0]).double()
    sets = z[:1200], y[:1200], z[1200:], y[1200:]
    assert (placed_r2(*sets) > 0.95).all()
    assert (placed_r2(*sets, components=39) < 0.9).all()


def test_a_network_reads_what_no_plane_through_the_features_tells():
    z = normal(1200, 4)
    y = torch.stack([z[:, 0] * z[:, 1], z[:, 2]], 1).double()
    linear, deep = (
        r_squared(probe(z[:1000], y[:1000])(z[1000:]), y[1000:])
        for probe in (linear_read_out, mlp_read_out)
    )
    assert linear[0] < 0.1 and linear[1] == pytest.approx(1)
    assert (deep > 0.9).all()
    again = mlp_read_out(z[:1000], y[:1000])(z[1000:])
    torch.testing.assert_close(r_squared(again, y[1000:]), deep, rtol=0, atol=0)


def test_ranks_correlate_as_scipy_has_it():
    from scipy.stats import spearmanr

    x, y = np.random.default_rng(0).integers(0, 9, (2, 60)).astype(float)
    assert spearman(x, y + x) == pytest.approx(spearmanr(x, y + x)[0])
