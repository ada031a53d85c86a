import pytest
import torch
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from hypothesis import given, settings
from hypothesis import strategies as st

from lesa.rows.forecasters import Lagrange, LinearRows, PlannedRow, Reuse, Taylor
from lesa.rows.rivals import ABCache, FoCa, Hermite, MeanCache, Spectrum

LAW = settings(deadline=None, derandomize=True, max_examples=50)
GRID = 1 - torch.linspace(0, 1, 21, dtype=torch.float64) ** 1.5

# Classical forecasters, the degree that they are exact to, and the variable it is counted in.
CLASSICAL = [
    (Reuse(), 0, "step"),
    (Taylor(0), 0, "step"),
    (Taylor(1), 1, "step"),
    (Taylor(2), 1, "step"),  # backward differences over k^j / j! are no Taylor series beyond straight lines
    (Taylor(3), 1, "step"),
    (Lagrange(0), 0, "time"),
    (Lagrange(1), 1, "time"),
    (Lagrange(2), 2, "time"),
    (Lagrange(3), 3, "time"),
    (Hermite(0), 0, "step"),
    (Hermite(1), 0, "step"),  # contracted, the slope counts by half
    (Hermite(2), 0, "step"),
    (Hermite(3, contraction=0.8), 0, "step"),
    (ABCache(1), 0, "step"),
    (ABCache(2), 0, "step"),
    (ABCache(3), 0, "step"),
    (ABCache(2, full_only=True), 0, "step"),
    (FoCa(), 1, "step"),
    (MeanCache(1), 0, "time"),
    (MeanCache(3), 0, "time"),  # it aims at the mean over the step, not at its beginning
    (Spectrum(mix=0.0), 1, "step"),  # the line alone: what the ridge fits does not sum to 1
]
BY_ORDER = [one for one in CLASSICAL if type(one[0]) in (Taylor, Lagrange) or repr(one[0]).endswith("contraction=0.5)")]
each_classical = pytest.mark.parametrize(("forecaster", "degree", "variable"), CLASSICAL, ids=lambda x: str(x))

# Increasing steps of which the last is skipped.
WALKS = st.lists(st.integers(0, 19), min_size=2, max_size=8, unique=True).map(sorted)


def forecast(forecaster, past, step, features):
    coefficients, offset, _ = forecaster.row(GRID, step, past)
    return coefficients @ features + offset


def polynomial(degree, variable, steps):
    x = GRID[list(steps)] if variable == "time" else torch.tensor(steps, dtype=torch.float64) / 20
    return x**degree


@each_classical
@LAW
@given(walk=WALKS)
def test_classical_rows_sum_to_one(forecaster, degree, variable, walk):
    *past, step = walk
    past = past[-forecaster.memory :]
    coefficients, offset, _ = forecaster.row(GRID, step, past)
    assert coefficients.shape == (len(past),) and coefficients.dtype == torch.float64
    assert offset.shape == () and offset == 0
    assert coefficients.sum().item() == pytest.approx(1, abs=1e-9 * coefficients.abs().sum().item())


@each_classical
@LAW
@given(walk=WALKS.filter(lambda walk: len(walk) >= 5))
def test_classical_rows_are_exact_up_to_their_degree(forecaster, degree, variable, walk):
    *past, step = walk
    past = past[-forecaster.memory :]
    for power in range(degree + 1):
        *known, wanted = polynomial(power, variable, [*past, step])
        got = forecast(forecaster, past, step, torch.stack(known))
        noise = forecaster.row(GRID, step, past).coefficients.abs().sum()
        assert abs(got - wanted) <= 1e-9 * noise


@each_classical
def test_classical_rows_are_not_exact_beyond_their_degree(forecaster, degree, variable):
    past, step = [2, 5, 8, 11][-forecaster.memory :], 13
    *known, wanted = polynomial(degree + 1, variable, [*past, step])
    assert abs(forecast(forecaster, past, step, torch.stack(known)) - wanted) > 1e-4


@pytest.mark.parametrize(("forecaster", "degree", "variable"), BY_ORDER, ids=lambda x: str(x))
@LAW
@given(walk=WALKS)
def test_with_a_short_past_the_order_drops_to_what_is_there(forecaster, degree, variable, walk):
    *past, step = walk
    past = past[-forecaster.memory :]
    lower = type(forecaster)(len(past) - 1)
    assert torch.equal(forecaster.row(GRID, step, past).coefficients, lower.row(GRID, step, past).coefficients)


@each_classical
@LAW
@given(walk=WALKS)
def test_past_steps_beyond_the_memory_are_not_used(forecaster, degree, variable, walk):
    *past, step = walk
    newest = forecaster.row(GRID, step, past[-forecaster.memory :]).coefficients
    unused = torch.zeros(len(past) - len(newest), dtype=torch.float64)
    torch.testing.assert_close(forecaster.row(GRID, step, past).coefficients, torch.cat([unused, newest]))


@pytest.mark.parametrize("order", range(4))
@LAW
@given(walk=WALKS, seed=st.integers(0, 2**31))
def test_taylor_gives_the_numbers_of_diffusers_own_state(order, walk, seed):
    *past, step = walk
    features = torch.randn(len(past), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    state = TaylorSeerState(torch.float64, max_order=order)
    for full, feature in zip(past, features, strict=True):
        state.current_step = full
        state.update((feature,))
    state.current_step = step
    taylor = Taylor(order)
    got = forecast(taylor, past[-taylor.memory :], step, features[-taylor.memory :])
    torch.testing.assert_close(got, state.predict()[0], rtol=1e-10, atol=1e-10)


def test_rows_by_hand():
    assert Reuse().row(GRID, 5, [3]).coefficients.tolist() == [1]
    assert Reuse().row(GRID, 5, [1, 2, 3]).coefficients.tolist() == [0, 0, 1]
    assert Taylor(1).row(GRID, 6, [1, 3]).coefficients.tolist() == [-1.5, 2.5]
    assert Taylor(2).row(GRID, 5, [1, 2, 3]).coefficients.tolist() == [2, -6, 5]
    even = torch.linspace(1, 0, 11, dtype=torch.float64)
    torch.testing.assert_close(Lagrange(2).row(even, 4, [1, 2, 3]).coefficients.tolist(), [1.0, -3.0, 3.0])


def test_lagrange_follows_the_grid_and_taylor_does_not():
    even = torch.linspace(1, 0, 21, dtype=torch.float64)
    assert torch.equal(Taylor(1).row(GRID, 6, [1, 3]).coefficients, Taylor(1).row(even, 6, [1, 3]).coefficients)
    assert not torch.allclose(
        Lagrange(1).row(GRID, 6, [1, 3]).coefficients, Taylor(1).row(GRID, 6, [1, 3]).coefficients
    )


@each_classical
def test_classical_forecasters_serve_all_streams_and_remember_no_forecast(forecaster, degree, variable):
    assert forecaster.for_stream("uncond") is forecaster
    assert not forecaster.remembers_forecasts
    assert 1 <= forecaster.wants(GRID, 5) <= forecaster.memory
    assert repr(eval(repr(forecaster))) == repr(forecaster)


@pytest.mark.parametrize("make", [Taylor, Lagrange, Hermite])
@pytest.mark.parametrize("number", [-1, 1.5])
def test_orders_are_whole_numbers(make, number):
    with pytest.raises(ValueError, match=f"got {number}"):
        make(number)


ROWS = {2: PlannedRow((0, 1), (-1.0, 2.0), 0.25), 3: PlannedRow((0, 1, 2), (0.0, 0.5, 0.5), 0.0)}


def test_linear_rows_give_back_their_numbers():
    free = LinearRows(GRID, ROWS)
    coefficients, offset, _ = free.row(GRID + 1e-6, 2, [0, 1])
    assert (coefficients.tolist(), offset.item()) == ([-1.0, 2.0], 0.25)
    assert coefficients.dtype == offset.dtype == torch.float64
    assert (free.memory, free.remembers_forecasts, free.wants(GRID, 2)) == (3, True, 2)


@pytest.mark.parametrize(
    ("grid", "step", "past", "message"),
    [
        (GRID**2, 2, [0, 1], "bound to their grid of 20 steps, got another one of 20"),
        (torch.tensor([1.0, 0.5, 0.0]), 1, [0], "got another one of 2"),
        (GRID, 4, [1, 2, 3], r"rows for steps \[2, 3\], got skipped step 4"),
        (GRID, 3, [0, 2], r"combines steps \[0, 1, 2\], got a history of \[0, 2\]"),
    ],
)
def test_linear_rows_are_bound_to_what_they_were_made_for(grid, step, past, message):
    with pytest.raises(ValueError, match=message):
        LinearRows(GRID, ROWS).row(grid, step, past)


def test_linear_rows_have_one_coefficient_for_each_past_step():
    with pytest.raises(ValueError, match="got 1 for 2 at step 2"):
        LinearRows(GRID, {2: PlannedRow((0, 1), (1.0,), 0.0)})
    with pytest.raises(ValueError, match="got none"):
        LinearRows(GRID, {})
