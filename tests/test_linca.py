"""LinCa: its map is invertible, its parts are forecast by their orders, training helps, and a run is as planned."""

import copy
from typing import Any

import pytest
import torch

from lesa.bench import benchmark, linca
from lesa.bench.lines import Pair
from lesa.bench.methods import REFERENCE
from lesa.host.pipelines import with_call
from lesa.host.runtime import accelerate
from lesa.rows.forecasters import Reuse
from lesa.rows.rivals import Hermite
from lesa.rows.schedule import Schedule

STEPS, PLAN = 8, Schedule.at([0, 1, 2, 5])
GRID = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)


def shaken(made: linca.LinCa) -> linca.LinCa:
    """Move every number of untrained maps, so that their couplings do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for numbers in made.parameters():
            numbers += 0.3 * torch.randn(numbers.shape, generator=generator)
    return made


@pytest.mark.parametrize("channels", [6, 7])
def test_the_map_is_invertible(channels):
    made = shaken(linca.LinCa(GRID, PLAN, channels, scale=3.0)).of(0)
    x = torch.randn(5, channels, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(made(x), x, atol=0.1)
    assert (made(x) - made(torch.zeros_like(x)) - (made(-x) - made(torch.zeros_like(x))) * -1).abs().max() > 1e-3
    torch.testing.assert_close(made.inverse(made(x)), x, atol=1e-4, rtol=1e-4)


def test_parts_are_forecast_by_their_orders():
    made = shaken(linca.LinCa(GRID, PLAN, 6))
    past = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    z = made.of(7)(past)
    found = made.parts(7, past)
    for order, part in enumerate((slice(0, 2), slice(2, 4), slice(4, 6))):
        row = Hermite(order).row(GRID, 7, [1, 2, 5][-order - 1 :]).coefficients.float()
        wanted = torch.einsum("k,knc->nc", row, z[-len(row) :, :, part])
        torch.testing.assert_close(found[:, part], wanted, atol=1e-5, rtol=1e-5)
    assert made.rows[3][0] == [0, 1, 2] and made.rows[7][0] == [1, 2, 5]


def test_of_order_zero_alone_it_is_reuse():
    made = shaken(linca.LinCa(GRID, PLAN, 6, linca.PUBLISHED._replace(orders=(0,))))
    past = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made.forecast(4, past), past[0], atol=1e-4, rtol=1e-4)


def test_training_finds_what_moves_and_what_stays():
    """A third of the channels jumps about nothing, the others go on a line, mixed: neither order alone is right."""
    generator = torch.Generator().manual_seed(4)
    slope, jumps = torch.randn(6, 1, 16, 4, generator=generator), torch.randn(6, STEPS, 16, 2, generator=generator)
    mixed = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    features = torch.cat([0.2 * jumps, slope * torch.arange(STEPS)[:, None, None]], -1) @ mixed
    recipe = linca.PUBLISHED._replace(segments=1, updates=300, batch=64, rate=1e-2, hidden=16)

    def off(updates: int) -> float:
        made = linca.train(features[:4], GRID, PLAN, recipe._replace(updates=updates))
        by_step = features[4:].movedim(1, 0)
        return sum(
            float((made.forecast(step, by_step[past]) - by_step[step]).square().mean())
            for step, (past, _) in made.rows.items()
        )

    assert off(300) < 0.6 * off(0)


def test_a_run_is_full_at_the_full_steps_and_leaves_no_trace(tiny_flux):
    pipe: Any = copy.copy(tiny_flux)
    pipe = with_call(pipe, dict(height=32, width=32, num_inference_steps=STEPS, max_sequence_length=16))
    pairs = [Pair("large blue fish on grey, right", 3), Pair("large green pear on white, left", 4)]
    reference = benchmark.observe(pipe, REFERENCE, pairs)
    channels = pipe.transformer.inner_dim
    reuse = linca.PUBLISHED._replace(orders=(0,))
    made = shaken(linca.LinCa(GRID, PLAN, channels, reuse)).requires_grad_(False)
    calls: list[int] = []
    hook = pipe.transformer.single_transformer_blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    drawn = benchmark.observe(pipe, linca.method(made), pairs)
    hook.remove()
    assert len(calls) == len(PLAN.full_steps(STEPS))
    with accelerate(pipe, Reuse(), schedule=PLAN, tap="feature"):
        reused = benchmark.observe(pipe, REFERENCE, pairs)
    assert abs(drawn.pictures[0].astype(int) - reused.pictures[0]).max() <= 1
    assert (benchmark.observe(pipe, REFERENCE, pairs).pictures[1] == reference.pictures[1]).all()
    other = shaken(linca.LinCa(torch.linspace(1, 0, 7), Schedule.at([0, 1]), channels, reuse)).requires_grad_(False)
    with pytest.raises(RuntimeError, match="runs of 6 steps"), linca.method(other).switch(pipe):
        pipe(pairs[0].prompt)
