"""LESA: experts for stages of a run, whose rows a KAN scales (arXiv 2602.20497)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lesa.predictors.base import Predictor
from lesa.predictors.kan import KAN, KANLayer, bspline_basis
from lesa.predictors.origin import Origin
from lesa.rows.grid import stage_of
from lesa.rows.row import Row

ROUNDING = 1e-6
HELD = 1e-3
"""How far a KAN may miss the alphas that it takes up."""
NEAR_REUSE = 0.02
BOUNDS, OTHER_BOUNDS = (0.9, 0.5), {"QwenImageTransformer2DModel": (0.9, 0.4)}
"""The paper's falling times between stages, and where a class of transformers has others."""


class Expert(nn.Module):
    """The part of LESA for one stage: h_s = h_{s-1} + alpha (sum_k w_k h_{s-k} + b), alpha = KAN(t_s - grid).

    `weight` is (K,), oldest first, and starts as the difference of the newest two (the newest one where K is 1); `bias`
    is a scalar.
    """

    def __init__(self, memory: int, kan: KAN):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(memory))
        self.bias = nn.Parameter(torch.empty(()))
        self.kan = kan
        if not self.weight.is_meta:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        self.bias.zero_()
        self.weight.zero_()
        self.weight[-2:] = torch.tensor([-1.0, 1.0])[-len(self.weight) :]

    def row(self, alpha: Tensor, held: int) -> Row:
        """Return the row over `held` past features; with fewer than K of them, of the newest weights."""
        used = min(held, len(self.weight))
        coefficients = functional.pad(alpha * self.weight[len(self.weight) - used :], (held - used, 0))
        newest = torch.zeros_like(coefficients)
        newest[-1] = 1.0
        return Row(coefficients + newest, alpha * self.bias)


class LESA(Predictor):
    """The stage-aware predictor of LESA (arXiv 2602.20497): one expert for each stage and stream.

    `bounds` are the falling times between stages, by default the paper's for the class of transformers, and `memories`
    how many past features each stage's expert combines.
    With `remembers_forecasts`, as in the paper, these are full and forecast ones; without, full steps only. A new
    predictor is near reuse in the first case (the newest difference after a full step is a correction, no slope) and
    the straight line through the newest two full steps in the second.

    `hidden`, `grid_size` and `span` shape the KANs, and `spline_noise` is how rough their curves start. The paper's
    (`LESA.paper`) cannot tell neighbouring steps apart: at 50 steps of FLUX it misses arbitrary alphas by more than
    their own size, since the first steps are 0.006 apart, its knots 1.2, and its curves nearly flat. Rough curves on
    knots 0.05 apart hold them to the last digits, with a tenth of the parameters.

    A new predictor is the same every time.

    Raises: ValueError if `bounds` do not fall, or there is not one memory, of at least 1, for each stage.
    """

    method = "lesa"

    def __init__(
        self,
        origin: Origin,
        *,
        bounds: Sequence[float] | None = None,
        memories: Sequence[int] = (4, 8, 8),
        remembers_forecasts: bool = False,
        hidden: Sequence[int] = (32,),
        grid_size: int = 40,
        span: Sequence[float] = (-1.0, 1.0),
        spline_noise: float = 40.0,
    ):
        super().__init__(origin)
        self.check_parts(len(memories), len(hidden) + 1)
        bounds = OTHER_BOUNDS.get(origin.transformer, BOUNDS) if bounds is None else bounds
        if len(memories) != len(bounds) + 1 or min(memories) < 1:
            raise ValueError(f"{len(bounds) + 1} stages need as many memories of at least 1, got {list(memories)}.")
        self.bounds, self.memories = falling(bounds), tuple(memories)
        self.stages = [stage_of(float(time), self.bounds) for time in self.grid[:-1]]
        self.memory, self.remembers_forecasts = max(memories), remembers_forecasts
        self._kan = dict(hidden=list(hidden), grid_size=grid_size, span=list(span), spline_noise=spline_noise)
        widths = [len(self.grid), *hidden, 1]

        def expert(memory: int) -> Expert:
            return Expert(memory, KAN(widths, grid_size, span=(span[0], span[1]), spline_noise=spline_noise))

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.experts = nn.ModuleDict({s: nn.ModuleList(map(expert, memories)) for s in origin.streams})
        if not self.only_shapes:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        for parameter in self.parameters():  # most of them stay: numbers of 16 bits halve the file
            parameter.copy_(parameter.half())
        alphas = self.slopes()
        for stream in self.origin.streams:
            self._absorb(alphas.fill_(NEAR_REUSE) if self.remembers_forecasts else alphas, stream)

    @classmethod
    def paper(cls, origin: Origin, **options: Any) -> LESA:
        """The predictor as published: history with forecasts, KANs of widths [S + 1, 256, 256, 1], grid 5 on [-3, 3].

        Train it with `Config(free_alphas=False)`.
        """
        kan = dict(hidden=(256, 256), grid_size=5, span=(-3.0, 3.0), spline_noise=0.02)
        return cls(origin, **{"remembers_forecasts": True, **kan, **options})

    def options(self) -> dict[str, Any]:
        own = dict(bounds=list(self.bounds), memories=list(self.memories), remembers_forecasts=self.remembers_forecasts)
        return {**own, **self._kan}

    def stage_experts(self, stream: str) -> list[Expert]:
        """Return the experts of one stream, the noisiest stage's first."""
        experts = self.experts[stream]
        assert isinstance(experts, nn.ModuleList)
        return cast("list[Expert]", list(experts))

    def numbers(self, stream: str) -> list[nn.Parameter]:
        return list(self.experts[stream].parameters())

    def wants(self, grid: Tensor, step: int) -> int:
        """Return the K of the step's stage, or as many past features as the schedule leaves if these are fewer."""
        return min(self.memories[self.stages[step]], len(self.past(step)))

    def stream_rows(
        self, stream: str, grid: Tensor, pasts: Mapping[int, Sequence[int]], alphas: Tensor | None = None
    ) -> dict[int, Row]:
        """Return the rows of several steps, with these `alphas`, shape (S,), in place of the KANs' if given."""
        experts = self.stage_experts(stream)
        alphas = self.alphas(stream, sorted(pasts)) if alphas is None else alphas
        return {step: experts[self.stages[step]].row(alphas[step], len(past)) for step, past in pasts.items()}

    def alphas(self, stream: str, steps: Sequence[int] | None = None) -> Tensor:
        """Return alpha of every step, shape (S,), as the KANs give it; 0 where `steps` leaves one out."""
        result = torch.zeros(len(self.stages))
        wanted = range(len(result)) if steps is None else steps
        for stage, expert in enumerate(self.stage_experts(stream)):
            mine = [step for step in wanted if self.stages[step] == stage]
            if mine:
                found = expert.kan(self._differences(mine)).squeeze(-1)
                result = result.index_put((torch.tensor(mine),), found)
        return result

    def absorb(self, alphas: Tensor, stream: str) -> None:
        """Set the last layer of every stage's KAN so that it gives these alphas, shape (S,).

        Raises: ValueError if the KANs cannot.
        """
        self._absorb(alphas, stream)
        with torch.no_grad():
            error = float((self.alphas(stream) - alphas).abs().max())
        if not error <= HELD * max(1.0, float(alphas.abs().max())):
            raise ValueError(
                f"the KANs of this predictor cannot hold these alphas, they miss one by {error:.2g}; train the KANs "
                "themselves (free_alphas=False, --paper), or give them rougher curves on more knots (spline_noise, "
                "grid_size)."
            )

    @torch.no_grad()
    def _absorb(self, alphas: Tensor, stream: str) -> None:
        """Make the smallest change that fits: a KAN is linear in its last layer, which has more numbers than S."""
        for stage, expert in enumerate(self.stage_experts(stream)):
            mine = [step for step, other in enumerate(self.stages) if other == stage]
            if not mine:
                continue
            *first, last = cast("list[KANLayer]", list(expert.kan))
            x = nn.Sequential(*first)(self._differences(mine))
            splines = bspline_basis(x, last.knots, last.order) * last.scale.T
            inputs = torch.cat([functional.silu(x).unsqueeze(-1), splines], dim=-1).double()
            missing = (alphas[mine] - last(x).squeeze(-1)).double()
            change = (torch.linalg.pinv(inputs.flatten(1), rtol=ROUNDING) @ missing).view(inputs.shape[1:]).float()
            last.base[0] += change[:, 0]
            last.spline[0] += change[:, 1:]

    def _differences(self, steps: Sequence[int]) -> Tensor:
        """The KAN's input, t_s - grid, shape (len(steps), S + 1)."""
        return (self.grid[list(steps), None] - self.grid).float()

    def __repr__(self) -> str:
        return f"LESA({self.origin.model!r}, schedule={self.origin.schedule!r})"


def falling(bounds: Sequence[float]) -> tuple[float, ...]:
    if sorted(bounds, reverse=True) != list(bounds):
        raise ValueError(f"the bounds between stages fall, as times do, got {list(bounds)}; sort them.")
    return tuple(bounds)
