import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from lesa.predictors import kan
from lesa.predictors.kan import KAN, KANLayer, bspline_basis

LAW = settings(deadline=None, derandomize=True, max_examples=50)
SIZES = st.tuples(st.integers(1, 8), st.integers(1, 4))  # grid size, order


def scipy_basis(x, knots, order):
    """Every basis function by scipy, zero outside its own knots."""
    splines = [
        BSpline.basis_element(knots[i : i + order + 2], extrapolate=False) for i in range(len(knots) - order - 1)
    ]
    return np.stack([np.nan_to_num(spline(x)) for spline in splines], axis=-1)


@LAW
@given(SIZES, st.integers(0, 2**31))
def test_the_basis_is_scipys_inside_and_outside_the_knots(sizes, seed):
    grid_size, order = sizes
    generator = np.random.default_rng(seed)
    knots = np.cumsum(generator.uniform(0.2, 1.5, (2, grid_size + 2 * order + 1)), axis=1)
    x = generator.uniform(knots.min() - 1, knots.max() + 1, (64, 2))
    basis = bspline_basis(torch.from_numpy(x), torch.from_numpy(knots), order)
    for i in range(2):
        np.testing.assert_allclose(basis[:, i], scipy_basis(x[:, i], knots[i], order), atol=1e-6)


def test_the_basis_is_zero_outside_the_knots_and_sums_to_one_inside_the_span():
    knots = KANLayer(1, 1).knots
    torch.testing.assert_close(knots[0], torch.arange(-3, 9) * 1.2 - 3)
    outside = torch.tensor([[-6.7], [6.7], [100.0]])
    inside = torch.linspace(-3, 3, 101)[:, None]
    assert (bspline_basis(outside, knots, 3) == 0).all()
    torch.testing.assert_close(bspline_basis(inside, knots, 3).sum(-1), torch.ones(101, 1))


def test_a_layer_is_its_base_branch_and_its_scaled_splines():
    torch.manual_seed(0)
    layer = KANLayer(3, 2).double()
    torch.nn.init.normal_(layer.spline)
    torch.nn.init.normal_(layer.scale)
    x = torch.randn(5, 4, 3, dtype=torch.float64) * 3
    expected = torch.zeros(5, 4, 2, dtype=torch.float64)
    for o in range(2):
        for i in range(3):
            base, spline, scale = layer.base[o, i].item(), layer.spline[o, i].tolist(), layer.scale[o, i].item()
            xi = x[..., i].numpy()
            curve = scipy_basis(xi, layer.knots[i].numpy(), 3) @ spline
            expected[..., o] += torch.from_numpy(base * xi / (1 + np.exp(-xi)) + scale * curve)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


def test_the_splines_start_as_small_noise_and_the_scales_at_the_spline_scale():
    torch.manual_seed(0)
    layer = KANLayer(64, 32)
    inner = layer.knots[0, 3:-3]
    curves = bspline_basis(inner[:, None], layer.knots[:1], 3)[:, 0] @ layer.spline.flatten(0, 1).T
    assert 0.9 * 0.002 < curves.abs().max() <= 0.002 + 1e-6  # half of 0.02 / 5 on each side
    assert (layer.scale == 0.2).all()
    assert 0.9 < layer.base.abs().max() * 8 <= 1  # uniform within 1 / sqrt(inputs)


def test_the_size_is_the_papers():
    sizes = [sum(p.numel() for p in KAN([51, 256, 256, 1]).parameters()) for _ in range(3)]
    assert sum(sizes) == 3 * 10 * (51 * 256 + 256 * 256 + 256) == 2_365_440


def test_knots_are_kept_with_the_weights():
    model, other = KAN([4, 3, 1], span=(-1, 1)), KAN([4, 3, 1])
    other.load_state_dict(model.state_dict())
    x = torch.rand(8, 4)
    assert torch.equal(other(x), model(x))


def test_a_kan_learns_a_function_that_its_base_branch_cannot():
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 256)[:, None]
    y = torch.cos(3 * x)
    model = KAN([1, 1], grid_size=12)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < 1e-4 < 0.1 < before


def test_all_parameters_get_a_gradient():
    torch.manual_seed(0)
    model = KAN([4, 8, 1])
    model(torch.rand(16, 4) * 2 - 1).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()} == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": [3]}, r"got \[3\]"),
        ({"widths": [3, 0, 1]}, r"got \[3, 0, 1\]"),
        ({"widths": [3, 1], "order": 0}, "got 5 and 0"),
        ({"widths": [3, 1], "span": (1.0, -1.0)}, r"got \(1.0, -1.0\)"),
    ],
)
def test_errors_say_what_was_got(options, message):
    with pytest.raises(ValueError, match=message):
        KAN(**options)


def test_examples():
    assert doctest.testmod(kan) == (0, 1)
