"""LinCa as a peer: a learned invertible map of features, whose parts are forecast with different orders.

The map E of a feature x (tokens, channels) is a few blocks, each an orthogonal mixing of channels and then an additive
coupling of their halves, v_1 = u_1 + F(u_2), v_2 = u_2 + G(v_1). Of z = E(x) the m-th part is forecast from full steps'
by Hermite polynomials of order m (0 is reuse), and x' = E^-1(z'). One map for each segment of the run is trained on
runs with every step full, by |x' - x|^2 + `weight` sum_m |z'_m - z_m|^2. It is no row: the map is not linear.

Source: arXiv 2608.17973, whose numbers are those of `Recipe` up to `weight`. It leaves open how large the parts are
(here the same), what F and G are (one hidden layer with GELU, from zero), the optimiser, its rate and how long it runs,
for which gaps it is trained (here those of the schedule that it runs on), and its polynomials' factor (HiCache's 0.5,
with differences for each step). It takes what all blocks added; here the feature is what enters the tap, and the map
sees it divided by the root of its mean square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lesa.bench.methods import FEATURE, Method
from lesa.bench.peers import peer
from lesa.host.clock import Moment, PipelineClock
from lesa.host.denoiser import Passage, attach
from lesa.host.tap import tap_of
from lesa.rows.rivals import Hermite
from lesa.rows.schedule import Schedule


class Recipe(NamedTuple):
    """How maps are made and trained."""

    orders: tuple[int, ...] = (0, 1, 2)
    blocks: int = 2
    hidden: int = 128
    segments: int = 3
    weight: float = 1.0
    updates: int = 600
    rate: float = 1e-3
    batch: int = 1024
    """Tokens of an update, all of one skipped step."""
    seed: int = 0


PUBLISHED = Recipe()


class Block(nn.Module):
    """An orthogonal mixing of channels, then an additive coupling of their halves."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.mixing = parametrizations.orthogonal(nn.Linear(channels, channels, bias=False))
        first = channels // 2
        self.first = _mlp(channels - first, hidden, first)
        self.second = _mlp(first, hidden, channels - first)
        self._sizes = (first, channels - first)

    def forward(self, x: Tensor) -> Tensor:
        u, w = self.mixing(x).split(self._sizes, -1)
        u = u + self.first(w)
        return torch.cat([u, w + self.second(u)], -1)

    def inverse(self, z: Tensor) -> Tensor:
        u, w = z.split(self._sizes, -1)
        w = w - self.second(u)
        return nn.functional.linear(torch.cat([u - self.first(w), w], -1), self.mixing.weight.T)  # type: ignore[operator]


def _mlp(channels: int, hidden: int, out: int) -> nn.Module:
    last = nn.Linear(hidden, out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), last)


class Map(nn.Module):
    """E, of features (..., channels) that are divided by `scale` first, and its inverse."""

    def __init__(self, channels: int, recipe: Recipe, scale: float):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, recipe.hidden) for _ in range(recipe.blocks))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = x / self.scale
        for block in self.blocks:
            x = block(x)
        return x

    def inverse(self, z: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            z = block.inverse(z)  # type: ignore[operator]
        return z * self.scale


class LinCa(nn.Module):
    """Maps for the segments of runs on one grid and schedule, and the rows of their parts at each skipped step."""

    def __init__(self, grid: Tensor, schedule: Schedule, channels: int, recipe: Recipe = PUBLISHED, scale: float = 1.0):
        super().__init__()
        self.steps, self.schedule, self.recipe = len(grid) - 1, schedule, recipe
        self.full = schedule.full_steps(self.steps)
        self.maps = nn.ModuleList(Map(channels, recipe, scale) for _ in range(recipe.segments))
        self.rows: dict[int, tuple[list[int], Tensor]] = {}
        most = max(recipe.orders) + 1
        for step in sorted(set(range(self.steps)) - set(self.full)):
            past = [k for k in self.full if k < step][-most:]
            rows = [torch.zeros(len(past), dtype=torch.float64) for _ in recipe.orders]
            for row, order in zip(rows, recipe.orders, strict=True):
                newest = past[-order - 1 :]
                row[-len(newest) :] = Hermite(order).row(grid, step, newest).coefficients
            self.rows[step] = past, torch.stack(rows).float()

    def of(self, step: int) -> Map:
        """Return the map of a step's segment."""
        found = self.maps[step * self.recipe.segments // self.steps]
        assert isinstance(found, Map)
        return found

    def parts(self, step: int, past: Tensor) -> Tensor:
        """Return the forecast z' of a skipped step from the features of its past, (K, ..., channels)."""
        parts = self.of(step)(past.float()).tensor_split(len(self.recipe.orders), -1)
        _, rows = self.rows[step]
        return torch.cat([torch.einsum("k,k...->...", row.to(z), z) for row, z in zip(rows, parts, strict=True)], -1)

    def forecast(self, step: int, past: Tensor) -> Tensor:
        """Return the forecast of a skipped step from the features of its past, (K, ..., channels)."""
        return self.of(step).inverse(self.parts(step, past)).to(past.dtype)

    def loss(self, step: int, past: Tensor, wanted: Tensor) -> Tensor:
        """Return what is off at a skipped step, of the feature, (n, channels), and of its parts, by their scale."""
        of, found = self.of(step), self.parts(step, past)
        off = (of.inverse(found) - wanted) / of.scale
        return off.square().mean() + self.recipe.weight * (found - of(wanted)).square().mean()


def train(features: Tensor, grid: Tensor, schedule: Schedule, recipe: Recipe = PUBLISHED) -> LinCa:
    """Train maps on the features of runs with every step full, (runs, S, tokens, channels)."""
    torch.manual_seed(recipe.seed)
    by_step = features.float().movedim(1, 0).flatten(1, 2)
    made = LinCa(grid, schedule, by_step.shape[-1], recipe, float(by_step.square().mean().sqrt()))
    drawn = torch.Generator().manual_seed(recipe.seed)
    for segment in made.maps:
        steps = [step for step in made.rows if made.of(step) is segment]
        optimiser = torch.optim.Adam(segment.parameters(), recipe.rate)
        for _ in range(recipe.updates if steps else 0):
            step = steps[int(torch.randint(len(steps), (), generator=drawn))]
            tokens = torch.randint(by_step.shape[1], (recipe.batch,), generator=drawn)
            past = by_step[made.rows[step][0]][:, tokens]
            optimiser.zero_grad()
            made.loss(step, past, by_step[step, tokens]).backward()
            optimiser.step()
    return made.requires_grad_(False)


# --- running


class Listener(Passage):
    """Keeps the features of full steps, and lets LinCa say what stands for the others."""

    def __init__(self, pipe: Any, linca: LinCa):
        self.clock, self._linca = PipelineClock(pipe), linca
        self._run: Moment | None = None
        self._step = -1
        self._kept: dict[int, Tensor] = {}

    def begin(self, _args: tuple, _kwargs: dict) -> Listener | None:
        """Decide on the step.

        Raises: RuntimeError if the transformer is called more than once a step, or runs have other steps.
        """
        run = self.clock.now()
        if run is None:
            return None
        if run is not self._run:
            self._run, self._step, self._kept = run, -1, {}
        if run.step != self._step + 1 or len(run.times) - 1 != self._linca.steps:
            raise RuntimeError(
                f"LinCa forecasts one call a step in runs of {self._linca.steps} steps, got step {run.step} after "
                f"{self._step} of {len(run.times) - 1}."
            )
        self._step = run.step
        self.full = run.step in self._linca.full
        return self

    def keep(self, feature: Any, part: int = 0) -> None:
        """Keep what enters the tap."""
        self._kept[self._step] = feature.detach()

    def forecast(self, part: int = 0) -> Any:
        """Forecast it from full steps."""
        past, _ = self._linca.rows[self._step]
        return self._linca.forecast(self._step, torch.stack([self._kept[step] for step in past]))


def method(linca: LinCa, name: str = "LinCa", place: str = FEATURE) -> Method:
    """Return the method that a pipeline accelerated by trained maps is, at a tap inside the transformer."""

    @contextmanager
    def on(pipe: Any) -> Iterator[None]:
        listener = Listener(pipe, linca)
        with ExitStack() as undo:
            undo.callback(listener.clock.attach())
            undo.callback(attach(pipe.transformer, tap_of(pipe.transformer, place), listener.begin))
            yield

    return peer(name, str(linca.schedule), on)


def features_of(runs: Sequence[Any]) -> Tensor:
    """Return the features of recorded runs of one stream, (runs, S, tokens, channels).

    Raises: ValueError if there are more streams, of which LinCa's paper trains a map each.
    """
    (streams,) = {run.streams for run in runs}
    if len(streams) > 1:
        raise ValueError(f"LinCa is trained here for models of one stream, got {', '.join(streams)}.")
    return torch.stack([run.features[streams[0]] for run in runs])
