import numpy as np
import pytest
import torch

from jepa_world.losses import VICReg, variance_covariance


def by_the_paper(z):
    """Return equations 1 to 4 of arXiv 2105.04906 for `(n d)`, in loops."""
    n, d = z.shape
    deviation = np.sqrt(z.var(0, ddof=1) + 1e-4)
    variance = sum(max(0.0, 1.0 - deviation[j]) for j in range(d)) / d
    centred = z - z.mean(0)
    matrix = sum(np.outer(row, row) for row in centred) / (n - 1)
    off = sum(matrix[i, j] ** 2 for i in range(d) for j in range(d) if i != j)
    return variance, off / d


def latents():
    random = np.random.default_rng(0)
    mixing = random.standard_normal((5, 6, 6)) * random.uniform(0.1, 1, (5, 1, 6))
    return random.standard_normal((5, 16, 6)) @ mixing + random.standard_normal((5, 1, 6))


def test_vicreg_is_the_formula_of_the_paper_averaged_over_groups():
    z = latents()
    expected = np.array([by_the_paper(group) for group in z])
    assert expected.min() > 0.01
    found = [float(term) for term in variance_covariance(torch.from_numpy(z))]
    assert found == pytest.approx(expected.mean(0), rel=1e-12)
    weighted = expected.mean(0) @ [1, 1 / 25]
    assert float(VICReg()(torch.from_numpy(z), step=3)) == pytest.approx(weighted, rel=1e-12)
    low = VICReg()(torch.from_numpy(z).bfloat16(), step=3)
    assert low.dtype == torch.float32 and float(low) == pytest.approx(weighted, rel=0.05)


def test_vicreg_is_least_where_channels_are_apart_and_wide_enough():
    """A Hadamard matrix has orthogonal columns; nothing but a narrow channel is then wrong."""
    two = np.array([[1.0, 1.0], [1.0, -1.0]])
    columns = torch.from_numpy(2 * np.kron(np.kron(two, two), two)[:, 1:])
    z = columns.clone().requires_grad_(True)
    loss = VICReg()(z, step=0)
    loss.backward()
    assert z.grad is not None
    assert loss.item() == pytest.approx(0, abs=1e-12) and float(z.grad.abs().max()) < 1e-12
    columns[:, 2] /= 1000
    assert float(VICReg()(columns, step=0)) == pytest.approx(0.99 / 7, rel=0.01)
