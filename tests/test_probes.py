import pytest
import torch

from jepa_world.probes import collapse_report, effective_rank


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
