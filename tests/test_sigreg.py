import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ON_CPU
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_world.sigreg import (
    SIGReg,
    anderson_darling,
    cramer_von_mises,
    infinite_slice_sigreg,
    jarque_bera,
    moments,
    null_mean,
    orthogonal_directions,
    random_directions,
    scale_term,
    sigreg,
    sliced_statistic,
    watson,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def definition(z: Tensor, directions: Tensor, t: Tensor, unbiased: bool = False) -> Tensor:
    """The statistic as the paper writes it: a trapezoid rule over the knots `t` as they are."""
    phi = torch.exp(-t.square() / 2)
    waves = torch.exp(1j * (z @ directions).unsqueeze(-1) * t)
    n = z.shape[-2]
    square = waves.sum(-3).abs().square()
    mean_square = (square - n) / (n * (n - 1)) if unbiased else square / n**2
    error = mean_square - 2 * phi * waves.mean(-3).real + phi.square()
    return n * torch.trapezoid(error * phi, t).mean()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (1.2 * z + 0.1).requires_grad_()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("knots", [2, 3, 4, 9, 17, 23])
@pytest.mark.parametrize("shape", [(50, 6), (3, 20, 6), (2, 2, 600, 2)])
def test_value_and_gradient_equal_the_definition(shape, knots, unbiased):
    z = draw(*shape)
    directions = random_directions(shape[-1], 130, seed=0, step=0).double()
    loss = sigreg(z, directions, knots=knots, t_max=3.0, unbiased=unbiased)
    expected = 2 * definition(z, directions, torch.linspace(0, 3, knots).double(), unbiased)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (loss, expected)))


def test_gradient_equals_finite_differences():
    directions = random_directions(4, 8, seed=0, step=0).double()
    for z in (draw(6, 4), draw(2, 5, 4)):
        assert torch.autograd.gradcheck(lambda z: 3 * sigreg(z, directions), z)
        assert torch.autograd.gradcheck(lambda z: 3 * sigreg(z, directions, unbiased=True), z)


def test_float32_is_as_exact_as_the_format_allows():
    z, directions = draw(2048, 64), random_directions(64, 256, seed=0, step=0)
    single = z.detach().float().requires_grad_()
    loss, exact = sigreg(single, directions), sigreg(z, directions)
    (gradient,), (exact_gradient,) = (
        torch.autograd.grad(loss, single),
        torch.autograd.grad(exact, z),
    )
    assert abs(loss.item() / exact.item() - 1) < 1e-6
    assert (gradient - exact_gradient).norm() < 1e-6 * exact_gradient.norm()


def test_a_narrow_format_is_computed_in_float32_under_autocast():
    z = draw(64, 8).detach().bfloat16().requires_grad_()
    directions = random_directions(8, 32, seed=0, step=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sigreg(z, directions)
        loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad is not None and z.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, sigreg(z.float(), directions))


def test_nine_knots_to_five_are_the_papers_seventeen_on_the_whole_line():
    z, directions = draw(100, 5), random_directions(5, 64, seed=0, step=0).double()
    whole_line = definition(z, directions, torch.linspace(-5, 5, 17).double())
    torch.testing.assert_close(sigreg(z, directions, knots=9, t_max=5.0), whole_line)


@pytest.mark.parametrize("n", [8, 100])
def test_gaussian_samples_have_the_null_mean_at_any_batch_size(n):
    z = torch.randn(200, n, 16, generator=torch.Generator().manual_seed(0))
    for unbiased in (False, True):
        regularise = SIGReg(slices=64, unbiased=unbiased)
        values = torch.stack([regularise(x, step) for step, x in enumerate(z)])
        error = values.std() / len(z) ** 0.5
        assert abs(values.mean() - null_mean(unbiased=unbiased)) < 4 * error


def test_unbiased_value_does_not_depend_on_the_batch_size():
    directions = random_directions(8, 64, seed=0, step=0)
    z = 0.5 * torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    whole = sigreg(z, directions, unbiased=True) / 4096
    parts = sigreg(z.reshape(-1, 8, 8), directions, unbiased=True) / 8
    biased = sigreg(z.reshape(-1, 8, 8), directions) / 8
    assert abs(parts / whole - 1) < 0.05 < abs(biased / whole - 1)


def test_rotation_changes_nothing_in_distribution():
    z = draw(64, 8) * torch.linspace(0.2, 2, 8)
    rotation = orthogonal_directions(8, 8, seed=1, step=0).double()
    values = [
        torch.stack([SIGReg(slices=32)(x, step) for step in steps])
        for x, steps in ((z, range(200)), (z @ rotation, range(200, 400)))
    ]
    error = torch.stack(values).std(1).square().sum().sqrt() / 200**0.5
    assert abs(values[0].mean() - values[1].mean()) < 4 * error


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 32])
def test_many_slices_reach_the_closed_form(dim, unbiased):
    z = draw(40, dim)
    values = torch.stack(
        [
            sigreg(z, random_directions(dim, 200, seed=0, step=step), unbiased=unbiased)
            for step in range(40)
        ]
    )
    limit = infinite_slice_sigreg(z, unbiased=unbiased)
    assert abs(values.mean() - limit) < 4 * values.std() / 40**0.5 + 1e-9
    many = sigreg(z, random_directions(dim, 20_000, seed=0, step=0), unbiased=unbiased)
    many, limit = (torch.autograd.grad(x, z)[0] for x in (many, limit))
    assert (many - limit).norm() < 0.1 * limit.norm()


def test_groups_are_averaged_one_by_one():
    z, directions = draw(3, 40, 6), random_directions(6, 32, seed=0, step=0)
    one_by_one = torch.stack([sigreg(group, directions) for group in z]).mean()
    torch.testing.assert_close(sigreg(z, directions), one_by_one)


def test_the_order_of_samples_does_not_matter():
    z, directions = draw(40, 6), random_directions(6, 32, seed=0, step=0)
    torch.testing.assert_close(sigreg(z.flip(0), directions), sigreg(z, directions))


@pytest.mark.parametrize("statistic", [None, anderson_darling], ids=["epps-pulley", "other"])
def test_no_samples_are_an_error(statistic):
    with pytest.raises(ValueError, match=r"no samples: z is \(0, 8\)"):
        SIGReg(statistic=statistic)(torch.zeros(0, 8), 0)


def test_a_bad_row_is_named():
    z = torch.randn(10, 4)
    z[7, 2], z[9, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"row 7 of z \(10, 4\) is the first of 2"):
        SIGReg()(z, 0)
    with pytest.raises(ValueError, match=r"row \(1, 2\) of z \(2, 5, 4\)"):
        SIGReg()(z.reshape(2, 5, 4), 0)


def test_slices_depend_on_seed_and_step_alone():
    z = draw(40, 6)
    first = [SIGReg(slices=16, seed=3)(z, step) for step in range(4)]
    torch.manual_seed(1)
    resumed = SIGReg(slices=16, seed=3)
    assert not resumed.state_dict()
    assert [resumed(z, step) for step in (2, 3)] == first[2:]
    others = [*first, SIGReg(slices=16, seed=4)(z, 0), SIGReg(slices=16, seed=2**32 + 3)(z, 0)]
    assert len({x.item() for x in others}) == 6


def test_orthogonal_slices_are_orthogonal_and_less_noisy():
    directions = orthogonal_directions(16, 40, seed=0, step=0)
    for block in directions.split(16, dim=1):
        torch.testing.assert_close(block.T @ block, torch.eye(block.shape[1]), atol=1e-5, rtol=0)
    z = draw(64, 16) * torch.linspace(0.2, 2, 16)
    independent, orthogonal = (
        torch.stack([SIGReg(slices=16, orthogonal=kind)(z, step) for step in range(200)])
        for kind in (False, True)
    )
    assert orthogonal.std() < 0.7 * independent.std()
    assert abs(orthogonal.mean() - independent.mean()) < 4 * independent.std() / 200**0.5


def test_scale_term_pushes_where_the_statistic_no_longer_does():
    force = {}
    for std in (1e-1, 1e-3):
        z = (std * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
        for weight in (0.0, 1.0):
            loss = SIGReg(slices=64, scale_weight=weight)(z, 0)
            force[std, weight] = torch.autograd.grad(loss, z)[0].norm().item()
    assert force[1e-3, 0.0] < 0.02 * force[1e-1, 0.0]
    assert force[1e-3, 1.0] > 0.5 * force[1e-1, 1.0]


def test_scale_term_of_gaussian_samples_is_one_half():
    z = torch.randn(100, 400, 50, generator=torch.Generator().manual_seed(0))
    assert abs(scale_term(z).item() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("statistic", "mean"),
    [
        (cramer_von_mises, 1 / 6),
        (anderson_darling, 1.0),
        (watson, 1 / 12),
        (jarque_bera, 4.0),
        (moments, 4.0),
    ],
)
def test_other_statistics_have_their_null_mean_and_see_what_is_not_gaussian(statistic, mean):
    normal = torch.randn(1, 1000, 2000, generator=torch.Generator().manual_seed(0))
    value = statistic(normal).mean().item()
    assert abs(value / mean - 1) < 0.05
    z = draw(200, 4)
    for other in (0.3 * z, 3 * z, z.pow(3)):
        loss = SIGReg(slices=64, statistic=statistic)(other, 0)
        assert loss.item() > 2 * mean
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_other_statistics_equal_scipy():
    stats = pytest.importorskip("scipy.stats")
    p = draw(50, 1).detach()
    expected = stats.cramervonmises(p[:, 0].numpy(), "norm").statistic
    assert cramer_von_mises(p).item() == pytest.approx(expected)
    unit = (p - p.mean()) / p.std(correction=0)
    expected = stats.jarque_bera(p[:, 0].numpy()).statistic
    assert jarque_bera(unit).item() == pytest.approx(expected)
    identity = torch.ones(1, 1, dtype=torch.float64)
    assert sliced_statistic(p, identity, watson) == watson(p).mean()


class LargestTensor(TorchDispatchMode):
    """Record how many numbers the largest tensor made by any operation has."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max(self.size, out.numel() if isinstance(out, Tensor) else 0)
        return out


def test_nothing_of_the_size_of_the_projections_is_stored():
    z = draw(4096, 64, dtype=torch.float32)
    with LargestTensor() as largest:
        SIGReg(slices=1024)(z, 0).backward()
    assert largest.size <= 4096 * 128


def test_example_of_the_class_runs():
    assert doctest.testmod(importlib.import_module("jepa_world.sigreg")).failed == 0


def test_example_of_the_page_runs():
    page = (ROOT / "docs" / "sigreg.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, {})


WORKER = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from jepa_world.sigreg import SIGReg, anderson_darling

folder, *cuts = sys.argv[1:]
accelerator = Accelerator()
rank, cuts = accelerator.process_index, [int(c) for c in cuts]
x = torch.randn(2, 48, 6, generator=torch.Generator().manual_seed(0))
x = x[:, cuts[rank] : cuts[rank + 1]]
for name, options in {
    "plain": {},
    "unbiased": {"unbiased": True},
    "scale": {"scale_weight": 1.0},
    "other": {"statistic": anderson_darling},
}.items():
    torch.manual_seed(0)
    encoder = accelerator.prepare(torch.nn.Linear(6, 8))
    loss = 0.5 * SIGReg(slices=200, **options)(encoder(x), step=7)
    accelerator.backward(loss)
    result = [loss.detach(), *(p.grad for p in encoder.parameters())]
    torch.save(result, f"{folder}/{name}-{accelerator.num_processes}-{rank}.pt")
accelerator.wait_for_everyone()
encoder, loss = accelerator.free_memory(encoder, loss)
accelerator.end_training()
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), "one may meet the interpreter in its end"
"""


def test_processes_with_uneven_batches_equal_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    cpu = ON_CPU | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment = os.environ | cpu
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launch, cuts in ([], ["0", "48"]), (torchrun, ["0", "31", "48"]):
        command = [sys.executable, *launch, str(script), str(tmp_path), *cuts]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    for name in ("plain", "unbiased", "scale", "other"):
        one = torch.load(tmp_path / f"{name}-1-0.pt")
        for rank in range(2):
            many = torch.load(tmp_path / f"{name}-2-{rank}.pt")
            torch.testing.assert_close(many[0], one[0], rtol=1e-5, atol=0)
            a, b = (torch.cat([g.flatten() for g in run[1:]]).double() for run in (many, one))
            assert abs(a.norm() / b.norm() - 1) < 1e-5
            assert torch.cosine_similarity(a, b, dim=0) > 1 - 1e-6
