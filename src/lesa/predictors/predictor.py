"""Predictors: the forecasters that are learned, how they are saved, and which one is shipped for a pipeline."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional

from lesa.host.pipelines import HOME
from lesa.learn.trajectory import write_atomically
from lesa.predictors import disk
from lesa.predictors.kan import KAN, KANLayer, bspline_basis
from lesa.rows.forecasters import Forecaster, Lagrange
from lesa.rows.grid import matches, stage_of, validate
from lesa.rows.plan import histories
from lesa.rows.row import Row
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "lesa-predictor-1"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FILES, CARD_FILE = (CONFIG_FILE, WEIGHTS_FILE), "README.md"
SHIPPED_FOLDER = "lesa"
"""A pipeline's own folder holds its predictors in this one; each is named by its method and schedule."""

ROUNDING = 1e-6
HELD = 1e-3
"""How far a KAN may miss the alphas that it takes up."""
NEAR_REUSE = 0.02
FEWER, MORE = 1.5, 1.1
"""By what factors the steps of a run may be fewer or more than those that a predictor for many grids was trained for.

Of emoji-flux's, trained for 20 to 50 and with 10 full steps: at 14 it is level with untrained rows or above, at 60
and 70 it is 3 and 7 dB below."""
BENT, FURTHER = 0.25, 1.5
"""How far from the same all along a grid's shift of a trained one may be, in logits, and by how many times the span of
the trained shifts it may lie outside of them.

Of emoji-flux's, trained at 64 and 96 pixels: those of 48 to 128 pixels lie up to 1.4 spans outside and are not bent;
beta, Karras' and exponential sigmas are bent by 0.7 to 1."""
BOUNDS, OTHER_BOUNDS = (0.9, 0.5), {"QwenImageTransformer2DModel": (0.9, 0.4)}
"""The paper's falling times between stages, and where a class of transformers has others."""

CARD = """---
{{ card_data }}
---

# {{ predictor }}

A predictor of the kind `{{ predictor.method }}` for {{ predictor.origin.model }} ({{ predictor.origin.transformer }}, \
{{ predictor.grid | length - 1 }} steps), on the schedule `{{ predictor.schedule }}`: it forecasts the transformer's
feature on the steps that the schedule skips.

```python
import lesa

predictor = lesa.Predictor.from_pretrained("the folder or repository of this file")
with lesa.accelerate(pipe, predictor):
    image = pipe("a prompt").images[0]
```

`config.json` says what it was trained on and for. It fits nothing else.
"""


@dataclass(frozen=True)
class Origin:
    """What a predictor was trained for and on: it fits nothing else.

    `model` names the pipeline, `transformer` is the class of its transformer and `config` that class's configuration;
    `grid` is the S + 1 times, `schedule` reads as `Schedule.parse` takes it, `data` is the digest of the recorded runs.
    """

    model: str
    transformer: str
    config: dict[str, Any]
    tap: Tap
    grid: tuple[float, ...]
    schedule: str
    streams: tuple[str, ...] = ("cond",)
    data: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Origin:
        """Read what `dataclasses.asdict` gave after a round trip through JSON."""
        blocks, module = entries["tap"]
        as_tuples = {name: tuple(entries[name]) for name in ("grid", "streams")}
        return cls(**{**entries, **as_tuples, "tap": Tap(tuple(blocks), module)})


def configuration(transformer: nn.Module) -> dict[str, Any]:
    """Return what a diffusers transformer was built with, without the entries that diffusers keeps for itself."""
    entries = {k: v for k, v in dict(getattr(transformer, "config", {})).items() if not k.startswith("_")}
    return json.loads(json.dumps(entries, default=str))


class Predictor(
    nn.Module, Forecaster, ModelHubMixin, library_name="lesa", tags=["diffusers", "lesa"], model_card_template=CARD
):
    """A learned forecaster, bound to one model, tap, grid and schedule.

    `save_pretrained` and `push_to_hub` are those of huggingface_hub; what they write and `Predictor.from_pretrained`
    reads is `model.safetensors` and `config.json`. As a forecaster it stands for its first stream; `for_stream` gives
    the others.
    """

    method: ClassVar[str]
    memory: int
    remembers_forecasts: bool

    def __init__(self, origin: Origin):
        super().__init__()
        self.origin = origin
        self.grid = validate(origin.grid)
        self.schedule = Schedule.parse(origin.schedule)
        self.full = self.schedule.full_steps(len(self.grid) - 1)

    @abstractmethod
    def stream_rows(self, stream: str, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        """Return the rows of several steps of one stream, differentiable; nothing is checked."""

    @abstractmethod
    def numbers(self, stream: str) -> list[nn.Parameter]:
        """Return the parameters of one stream."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return the arguments of the constructor besides `origin`, as JSON can hold them."""

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        """Return the row of the first stream.

        Raises: ValueError if the predictor is bound to another grid or schedule.
        """
        return self.rows_of(grid, {step: past})[step]

    def rows_of(self, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        """Return the rows of several steps of the first stream.

        Raises: ValueError if the predictor is bound to another grid or schedule.
        """
        return self.for_stream(self.origin.streams[0]).rows_of(grid, pasts)

    def for_stream(self, name: str) -> Forecaster:
        """Return the forecaster of one stream.

        Raises: ValueError if the predictor was not trained for it.
        """
        if name not in self.origin.streams:
            raise ValueError(
                f"this predictor was trained for the streams {', '.join(self.origin.streams)}, got {name!r}; train one "
                "on runs with the guidance that you use."
            )
        return _Stream(self, name)

    def schedule_for(self, grid: Sequence[float] | Tensor, budget: int | None = None, start: int = 0) -> Schedule:
        """Return the schedule of a run on this grid that begins at `start`; with a `budget`, one of so many full steps.

        Raises: ValueError if there is none such, or the predictor is not for this grid.
        """
        self.check_grid(validate(grid))
        if budget not in (None, len(self.full)):
            raise ValueError(
                f"this predictor was trained for {len(self.full)} full steps, got a budget of {budget}; take another."
            )
        return self.schedule

    def is_for(self, schedule: Schedule | None = None, budget: int | None = None) -> bool:
        """Tell whether the predictor was trained for this schedule and this number of full steps, whatever the grid."""
        return schedule in (None, self.schedule) and budget in (None, len(self.full))

    def check_grid(self, grid: Tensor) -> None:
        """Raise ValueError unless the predictor can run on this grid: the one that it was trained for."""
        if not matches(grid, self.grid):
            raise ValueError(
                f"this predictor was trained for {_grid_words(self.grid)}, got {_grid_words(grid)}; call the pipeline "
                f"with num_inference_steps={len(self.grid) - 1} and the image size it was trained for, or train one."
            )

    def past(self, step: int) -> list[int]:
        """Return the steps whose features the history holds at a step of a run on the predictor's schedule."""
        return [k for k in range(step) if self.remembers_forecasts or k in self.full][-self.memory :]

    def check_past(self, step: int, past: Sequence[int]) -> None:
        """Raise ValueError unless a run on the predictor's schedule skips this step and has this past there."""
        if step in self.full or self.past(step) != list(past):
            raise ValueError(
                f"this predictor was trained for {self.schedule!r}, got step {step} after the steps {list(past)}; run "
                "it on that schedule and from the first step on, or train another."
            )

    def check_model(self, transformer: nn.Module, tap: Tap) -> None:
        """Raise ValueError unless the predictor fits this transformer, tapped there.

        Of its configuration the entries that both know have to agree: new releases of diffusers add entries.
        """
        name, config, mine = type(transformer).__name__, configuration(transformer), self.origin
        advice = "take the predictor of this model, or train one."
        if name != mine.transformer:
            raise ValueError(
                f"this predictor was trained for {mine.model}, a {mine.transformer}, got a {name}; {advice}"
            )
        other = sorted(k for k in config.keys() & mine.config.keys() if config[k] != mine.config[k])
        if other:
            differences = ", ".join(f"{k}={config[k]} instead of {mine.config[k]}" for k in other[:3])
            raise ValueError(
                f"this predictor was trained for {mine.model}, got another {name} ({differences}); {advice}"
            )
        if tap != mine.tap:
            raise ValueError(
                f"this predictor was trained for the feature at {tuple(mine.tap)}, got the tap {tuple(tap)}; "
                "accelerate with the predictor's tap, or train one for this."
            )

    def slopes(self) -> Tensor:
        """Return alpha of the line through the two newest full steps before each step, (S,); 0 where there are fewer.

        With it h_s = h_new + alpha (h_new - h_old).
        """
        slopes = torch.zeros(len(self.grid) - 1)
        for step in range(len(slopes)):
            newest = [k for k in self.full if k < step][-2:]
            if len(newest) == 2:
                slopes[step] = (step - newest[1]) / (newest[1] - newest[0])
        return slopes

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load the predictor in a folder or a repository of the hub; options as of `hf_hub_download`.

        Raises: FileNotFoundError if there is none; ValueError if it is damaged or of another kind.
        """
        source = str(pretrained_model_name_or_path)
        config, weights = (_fetch(source, name, options) for name in (CONFIG_FILE, WEIGHTS_FILE))
        predictor = _read(source, config.read_bytes(), weights.read_bytes())
        if not isinstance(predictor, cls):
            raise ValueError(
                f"{source} holds a {type(predictor).__name__}, not a {cls.__name__}; load it as a Predictor."
            )
        return predictor

    def digest(self) -> str:
        """Return the SHA-256 of what `save_pretrained` writes."""
        return _digest(*self._contents())

    def _contents(self) -> tuple[dict[str, Any], bytes]:
        """Return what the two files hold."""
        weights = to_bytes({name: _without_loss(t) for name, t in sorted(self.state_dict().items())})
        return dict(format=FORMAT, method=self.method, options=self.options(), **asdict(self.origin)), weights

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write the predictor into a folder, in the place of one that is there; options are huggingface_hub's.

        Raises: ValueError if the folder holds another model's configuration, which would be lost.
        """
        check_place(save_directory, begun=True)
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        entries, weights = self._contents()
        entries["sha256"] = _digest(entries, weights)
        write_atomically(save_directory / WEIGHTS_FILE, weights)
        write_atomically(save_directory / CONFIG_FILE, (json.dumps(entries, indent=1) + "\n").encode())

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Describe the predictor for people; `save_pretrained` writes it where there is no README.md yet."""
        return super().generate_model_card(*args, predictor=self, **kwargs)


class _Stream(Forecaster):
    """One stream of a predictor."""

    def __init__(self, predictor: Predictor, name: str):
        self._predictor, self._name = predictor, name
        self.memory, self.remembers_forecasts = predictor.memory, predictor.remembers_forecasts

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        return self.rows_of(grid, {step: past})[step]

    def rows_of(self, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        self._predictor.check_grid(grid)
        for step, past in pasts.items():
            self._predictor.check_past(step, past)
        return self._predictor.stream_rows(self._name, grid, pasts)

    def wants(self, grid: Tensor, step: int) -> int:
        return self._predictor.wants(grid, step)

    def __repr__(self) -> str:
        return f"{self._predictor!r}.for_stream({self._name!r})"


class Expert(nn.Module):
    """The part of LESA for one stage: h_s = h_{s-1} + alpha (sum_k w_k h_{s-k} + b), alpha = KAN(t_s - grid).

    `weight` is (K,), oldest first, and starts as the difference of the newest two (the newest one where K is 1); `bias`
    is a scalar.
    """

    def __init__(self, memory: int, kan: KAN):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(memory))
        self.bias = nn.Parameter(torch.zeros(()))
        self.kan = kan
        with torch.no_grad():
            self.weight[-2:] = torch.tensor([-1.0, 1.0])[-memory:]

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
        bounds = OTHER_BOUNDS.get(origin.transformer, BOUNDS) if bounds is None else bounds
        if len(memories) != len(bounds) + 1 or min(memories) < 1:
            raise ValueError(f"{len(bounds) + 1} stages need as many memories of at least 1, got {list(memories)}.")
        self.bounds, self.memories = _falling(bounds), tuple(memories)
        self.stages = [stage_of(float(time), self.bounds) for time in self.grid[:-1]]
        self.memory, self.remembers_forecasts = max(memories), remembers_forecasts
        self._kan = dict(hidden=list(hidden), grid_size=grid_size, span=list(span), spline_noise=spline_noise)
        widths = [len(self.grid), *hidden, 1]

        def expert(memory: int) -> Expert:
            return Expert(memory, KAN(widths, grid_size, span=(span[0], span[1]), spline_noise=spline_noise))

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.experts = nn.ModuleDict({s: nn.ModuleList(map(expert, memories)) for s in origin.streams})
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


class L2P(Predictor):
    """Free linear rows, one number for each past feature of each skipped step (L2P, arXiv 2604.26365).

    They start at the straight line through the newest two full steps, or at reuse if it `remembers_forecasts` or
    without `slope`.

    Raises: ValueError if `memory` is less than 1.
    """

    method = "l2p"

    def __init__(self, origin: Origin, *, memory: int = 4, remembers_forecasts: bool = False, slope: bool = True):
        super().__init__(origin)
        if memory < 1:
            raise ValueError(f"a row combines at least 1 past feature, got memory {memory}; raise it.")
        self.memory, self.remembers_forecasts = memory, remembers_forecasts
        start = torch.zeros(len(self.grid) - 1, memory)
        start[:, -1] = 1.0
        if slope and memory > 1 and not remembers_forecasts:
            start[:, -2:] += self.slopes()[:, None] * torch.tensor([-1.0, 1.0])
        self.coefficients = nn.ParameterDict({s: nn.Parameter(start.clone()) for s in origin.streams})

    def options(self) -> dict[str, Any]:
        return dict(memory=self.memory, remembers_forecasts=self.remembers_forecasts)

    def numbers(self, stream: str) -> list[nn.Parameter]:
        return [self.coefficients[stream]]

    def wants(self, grid: Tensor, step: int) -> int:
        """Return how many past features the schedule leaves in the history."""
        return len(self.past(step))

    def stream_rows(self, stream: str, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        table = self.coefficients[stream]
        return {step: Row(table[step, self.memory - len(past) :], table.new_zeros(())) for step, past in pasts.items()}

    def __repr__(self) -> str:
        return f"L2P({self.origin.model!r}, schedule={self.origin.schedule!r})"


class ContinuousLESA(Predictor):
    """LESA as a function of times: one predictor for many grids, image sizes and schedules.

    Its inputs are the times of the row alone, not the whole grid. A row is Newton's form of the polynomial in t through
    the newest full steps, with every term scaled by the KAN of the step's stage:

        h_s = p_0 + sum_j (1 + a_j) (p_j - p_{j-1}),   (a_1, ..., a_J) = KAN_stage(t_s, t_1, ..., t_{J+1})

    where p_j is the forecast of `Lagrange(j)` and t_1, t_2, ... are the times of the newest full steps, 1 where there
    are none. A new predictor is `Lagrange(J)`, J being its `order`, and the KAN bends it from there.

    It gives a row for any step after any full steps, so any schedule can be run, and planned for it, on grids of about
    as many steps (a KAN extrapolates badly: runs of 4 steps need a predictor of their own) that are the trained ones
    but for their shift. `schedules` are
    the grids that it was trained for with the schedules planned for each, several if they differ in the number of full
    steps; the default is the origin's grid and schedule alone.

    Raises: ValueError if `bounds` do not fall, or `order` is less than 1.
    """

    method = "lesa-continuous"
    remembers_forecasts = False

    def __init__(
        self,
        origin: Origin,
        *,
        schedules: Sequence[tuple[Sequence[float], Sequence[str]]] = (),
        bounds: Sequence[float] | None = None,
        order: int = 3,
        hidden: Sequence[int] = (16,),
        grid_size: int = 10,
        spline_noise: float = 3.0,
    ):
        super().__init__(origin)
        if order < 1:
            raise ValueError(f"a polynomial's order is at least 1, got {order}; raise it.")
        bounds = OTHER_BOUNDS.get(origin.transformer, BOUNDS) if bounds is None else bounds
        self.schedules = [(tuple(grid), tuple(texts)) for grid, texts in schedules]
        self.schedules = self.schedules or [(origin.grid, (origin.schedule,))]
        self.bounds, self.order, self.memory = _falling(bounds), order, order + 1
        pasts = (_fullest_start(Schedule.parse(text), grid) for grid, texts in self.schedules for text in texts)
        self._fewest = min(self.memory, *pasts)
        self._kan = dict(hidden=list(hidden), grid_size=grid_size, spline_noise=spline_noise)
        widths = [order + 2, *hidden, order]

        def expert() -> KAN:
            return KAN(widths, grid_size, span=(0.0, 1.0), spline_noise=spline_noise, spline_scale=1.0)

        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            self.experts = nn.ModuleDict({s: nn.ModuleList(expert() for _ in (*bounds, 0)) for s in origin.streams})
            for parameter in self.parameters():
                parameter.copy_(parameter.half())
            for stream in origin.streams:
                for kan in self.stage_kans(stream):
                    last = cast("KANLayer", kan[-1])
                    last.base.zero_()
                    last.spline.zero_()

    def options(self) -> dict[str, Any]:
        schedules = [[list(grid), list(texts)] for grid, texts in self.schedules]
        return dict(schedules=schedules, bounds=list(self.bounds), order=self.order, **self._kan)

    def stage_kans(self, stream: str) -> list[KAN]:
        """Return the KANs of one stream, the noisiest stage's first."""
        return cast("list[KAN]", list(cast("nn.ModuleList", self.experts[stream])))

    def numbers(self, stream: str) -> list[nn.Parameter]:
        return list(self.experts[stream].parameters())

    def check_grid(self, grid: Tensor) -> None:
        """Raise ValueError unless the grid has about as many steps as a trained one, and is one but for its shift."""
        trained = [torch.tensor(times, dtype=torch.float64) for times, _ in self.schedules]
        counts = sorted(len(times) - 1 for times in trained)
        advice = "train one for such a grid, or take a forecaster that needs no training, e.g. lesa.Lagrange(1)."
        if not counts[0] / FEWER <= len(grid) - 1 <= counts[-1] * MORE:
            raise ValueError(
                f"this predictor was trained for {counts[0]} to {counts[-1]} steps, got {_grid_words(grid)}; {advice}"
            )
        if min(_shift(grid, other)[1] for other in trained) > BENT:
            raise ValueError(
                f"this predictor was trained for grids like {_grid_words(trained[0])}, up to a shift, got times spread "
                f"otherwise, {_grid_words(grid)}; {advice}"
            )
        shifts = [_shift(other, trained[0])[0] for other in trained]
        room = FURTHER * (max(shifts) - min(shifts)) + BENT
        if not min(shifts) - room <= _shift(grid, trained[0])[0] <= max(shifts) + room:
            raise ValueError(
                f"this predictor was trained for grids that reach {_middle(trained)} halfway, got {_grid_words(grid)} "
                f"that reach {_middle([grid])}, a shift too far from those; {advice}"
            )

    def check_past(self, step: int, past: Sequence[int]) -> None:
        """Accept any past."""

    def wants(self, grid: Tensor, step: int) -> int:
        """Return the fewest past features that a row was trained with: with so many or more it is no makeshift.

        Most planned schedules skip step 1, after which rows have one past feature: then that is all that it wants.
        """
        return self._fewest

    def is_for(self, schedule: Schedule | None = None, budget: int | None = None) -> bool:
        known = [(Schedule.parse(text), len(grid) - 1) for grid, texts in self.schedules for text in texts]
        return any(
            schedule in (None, other) and budget in (None, len(other.full_steps(steps))) for other, steps in known
        )

    def schedule_for(self, grid: Sequence[float] | Tensor, budget: int | None = None, start: int = 0) -> Schedule:
        """Return the schedule trained for this grid, or of those of others, with full steps after the same shares of
        the run, the one whose rows are most like trained ones.

        Of several, the one with `budget` full steps, or the most. A run that begins at a later step has a full step
        there, and those of the schedule that come after.

        Raises: ValueError if no schedule has such a budget, or the predictor is not for this grid.
        """
        grid = validate(grid)
        self.check_grid(grid)
        steps, found = len(grid) - 1, self._full_steps()
        budget = max(found) if budget is None else budget
        if budget not in found or budget > steps:
            raise ValueError(
                f"this predictor has schedules of {', '.join(map(str, sorted(found)))} full steps, got a budget of "
                f"{budget} on {_grid_words(grid)}; name one of these, or plan another (lesa plan) and pass it."
            )
        own = [full for times, full in found[budget] if matches(grid, torch.tensor(times, dtype=torch.float64))]
        made = own or list(dict.fromkeys(_stretched(full, len(times) - 1, steps) for times, full in found[budget]))
        full = min(made, key=lambda one: self._strangeness(grid, one)) if len(made) > 1 else made[0]
        return Schedule.at([start, *(step for step in full if step > start)])

    def _full_steps(self) -> dict[int, list[tuple[tuple[float, ...], tuple[int, ...]]]]:
        """Return the trained schedules by their number of full steps: times of the grid, full steps."""
        found: dict[int, list[tuple[tuple[float, ...], tuple[int, ...]]]] = {}
        for times, texts in self.schedules:
            for text in texts:
                full = Schedule.parse(text).full_steps(len(times) - 1)
                found.setdefault(len(full), []).append((times, full))
        return found

    def _strangeness(self, grid: Tensor, full: Sequence[int]) -> float:
        """Return how far the times that rows are made of are from the nearest trained row's, the mean over rows."""
        trained = [self._inputs(times, some) for known in self._full_steps().values() for times, some in known]
        mine = self._inputs(grid.tolist(), full)
        if not len(mine):
            return 0.0
        return float(torch.cdist(mine, torch.cat(trained), compute_mode="donot_use_mm_for_euclid_dist").amin(1).mean())

    def _inputs(self, times: Sequence[float], full: Sequence[int]) -> Tensor:
        """Return the times that each row of a run combines, (rows, order + 2), as `bends` takes them."""
        pasts = histories(len(times) - 1, full, 0, self.memory, False)
        rows = [[times[step], *(times[k] for k in reversed(past))] for step, past in pasts]
        padded = [row + [1.0] * (self.order + 2 - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.float64).reshape(-1, self.order + 2)

    def stream_rows(self, stream: str, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        times = grid.tolist()
        newest = {step: tuple(times[k] for k in past[-self.memory :]) for step, past in pasts.items()}
        bends = self.bends(stream, [(times[step], *reversed(newest[step])) for step in pasts])
        rows = {}
        for bend, (step, past) in zip(bends, pasts.items(), strict=True):
            terms = _newton_terms(times[step], newest[step], self.order)
            coefficients = terms[0] + (1 + bend) @ terms[1:]
            rows[step] = Row(functional.pad(coefficients, (len(past) - len(coefficients), 0)), torch.zeros(()))
        return rows

    def bends(self, stream: str, times: Sequence[tuple[float, ...]]) -> Tensor:
        """Return by how much each term of each row is scaled besides 1, (rows, order), from (t_s, t_1, t_2, ...)."""
        inputs = torch.ones(len(times), self.order + 2)
        for k, some in enumerate(times):
            inputs[k, : len(some)] = torch.tensor(some)
        stages = torch.tensor([stage_of(some[0], self.bounds) for some in times])
        result = torch.zeros(len(times), self.order)
        for stage, kan in enumerate(self.stage_kans(stream)):
            mine = (stages == stage).nonzero()[:, 0]
            if len(mine):
                result = result.index_copy(0, mine, kan(inputs[mine]))
        return result

    def __repr__(self) -> str:
        return f"ContinuousLESA({self.origin.model!r}, {len(self.schedules)} grids)"


@lru_cache(maxsize=1 << 14)
def _newton_terms(time: float, past: tuple[float, ...], order: int) -> Tensor:
    """Return the rows p_0, p_1 - p_0, ..., p_order - p_{order-1}: (order + 1, len(past)), the polynomials through the
    newest full steps at times `past`, oldest first, at `time`; the last ones are 0 where these are too few."""
    grid = torch.tensor([*past, time], dtype=torch.float64)
    polynomials = [Lagrange(j).row(grid, len(past), range(len(past))).coefficients for j in range(order + 1)]
    terms = torch.stack([polynomials[0], *(b - a for a, b in pairwise(polynomials))])
    return terms.float()


def _fullest_start(schedule: Schedule, grid: Sequence[float]) -> int:
    """Return how many past features the first skipped step of a schedule has, all of them those of full steps."""
    full = schedule.full_steps(len(grid) - 1)
    return next((k for k, step in enumerate(full) if k != step), len(full))


def _stretched(full: Sequence[int], steps: int, wanted: int) -> tuple[int, ...]:
    """Return the full steps of a run of so many steps after the same shares of it: all different, the last one last."""
    result = [round(step * (wanted - 1) / max(steps - 1, 1)) for step in full]
    for k in range(1, len(result)):
        result[k] = max(result[k], result[k - 1] + 1)
    for k in range(len(result)):
        result[k] = min(result[k], wanted - len(result) + k)
    return tuple(result)


def _shift(grid: Tensor, other: Tensor) -> tuple[float, float]:
    """Return by how much a grid is the other one shifted, in logits, and how far from that it is anywhere.

    Shifts of flow matching, t -> s t / (1 + (s - 1) t), add ln s to logits. Looked at from a tenth of the run to nine.
    """
    shares = torch.linspace(0.1, 0.9, 17, dtype=torch.float64)
    moved = _times_after(shares, grid).logit(1e-6) - _times_after(shares, other).logit(1e-6)
    middle = float(moved.median())
    return middle, float((moved - middle).abs().max())


def _times_after(shares: Tensor, grid: Tensor) -> Tensor:
    """Return the times of a run after these shares of its steps, on straight lines between its own."""
    places = shares * (len(grid) - 1)
    before = places.floor().long().clamp(max=len(grid) - 2)
    return torch.lerp(grid[before], grid[before + 1], places - before)


def _middle(grids: Sequence[Tensor]) -> str:
    middles = sorted(
        {f"t = {float(_times_after(torch.tensor([0.5], dtype=torch.float64), grid)):.3f}" for grid in grids}
    )
    return " to ".join(dict.fromkeys([middles[0], middles[-1]]))


def _falling(bounds: Sequence[float]) -> tuple[float, ...]:
    if sorted(bounds, reverse=True) != list(bounds):
        raise ValueError(f"the bounds between stages fall, as times do, got {list(bounds)}; sort them.")
    return tuple(bounds)


def shipped_for(pipe: Any, schedule: Schedule | None = None, budget: int | None = None) -> Predictor:
    """Load the predictor that lies beside a pipeline's own files, or those of the LoRA that it was loaded with: of
    several, the one for many grids, and then the LESA with the most full steps, on a planned schedule rather than a
    rule's, whose validation runs ended nearest to their reference runs.

    With a `schedule`, only those that were trained for it count; with a `budget`, those for so many full steps.

    Raises: LookupError if there is none.
    """
    own = getattr(getattr(pipe, "config", None), "_name_or_path", "")
    source = str(getattr(pipe, HOME, None) or own or type(pipe).__name__)
    found = sorted(path.parent for path in Path(source).glob(f"{SHIPPED_FOLDER}/*/{CONFIG_FILE}"))
    if not found:
        raise LookupError(
            f"no predictor is shipped for {source}. Make one of a few prompts (lesa calibrate) or of many "
            "(lesa collect, lesa train), or name one (lesa.Predictor.from_pretrained(...)). Rows without training need "
            "a schedule: let lesa plan choose one, or, with less to expect, take every third step: "
            "lesa.accelerate(pipe, lesa.Taylor(order=1), schedule=lesa.Schedule.every(3))."
        )
    loaded = [one for one in map(Predictor.from_pretrained, found) if one.is_for(schedule, budget)]
    if not loaded:
        names, wanted = ", ".join(folder.name for folder in found), repr(schedule or f"{budget} full steps")
        raise LookupError(f"no predictor shipped for {source} was trained for {wanted}, only {names}; train one.")

    def merits(p: Predictor) -> tuple:
        drift = p.origin.training.get("drift", math.inf)
        return isinstance(p, ContinuousLESA), isinstance(p, LESA), len(p.full), p.schedule.rule == "at", -drift

    return max(loaded, key=merits)


def check_place(folder: str | Path, begun: bool = False, also: Sequence[str] = ()) -> None:
    """Check that a folder holds a predictor, or nothing in the place of one or of what is written `also`.

    Where that has `begun`, a kill may have left anything but a configuration.

    Raises: ValueError if it holds something else there.
    """
    try:
        entries = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return disk.check_free(folder, [] if begun else [*FILES, *also], "a predictor")
    except ValueError:
        entries = None
    if not isinstance(entries, dict) or entries.get("format") != FORMAT:
        disk.check_free(folder, FILES, "a predictor")


def _read(source: str, config: bytes, weights: bytes) -> Predictor:
    """Make a predictor of its two files, which nobody must have changed."""
    from lesa.predictors.solved import Solved  # it is made of what is in here

    try:
        entries = json.loads(config)
        if entries.get("format") != FORMAT:
            raise ValueError(f"its format is {entries.get('format')!r}, not {FORMAT!r}")
        if entries.pop("sha256", None) != _digest(entries, weights):
            raise ValueError("its files are not as they were saved")
        kind = {known.method: known for known in (LESA, L2P, ContinuousLESA, Solved)}[entries.pop("method")]
        options = entries.pop("options")
        del entries["format"]
        predictor = kind(Origin.from_dict(entries), **options)
        predictor.load_state_dict({name: t.float() for name, t in from_bytes(weights).items()})
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{source} holds no whole predictor of lesa ({error}); fetch or train it again.") from error
    return predictor.eval()


def _fetch(source: str, name: str, options: Mapping[str, Any]) -> Path:
    if Path(source).is_dir():
        if not (Path(source) / name).exists():
            raise FileNotFoundError(
                f"{source} holds no {name}, so no predictor of lesa; name its folder, or train one."
            )
        return Path(source) / name
    try:
        return Path(hf_hub_download(source, name, **options))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} is neither a folder here nor a predictor on the hub ({error}); check its name."
        ) from error


def _without_loss(tensor: Tensor) -> Tensor:
    """Store half the bytes where no number changes by it."""
    half = tensor.half()
    return (half if torch.equal(half.to(tensor.dtype), tensor) else tensor).contiguous()


def _digest(entries: Mapping[str, Any], weights: bytes) -> str:
    """Return the SHA-256 of a predictor, however its JSON is laid out."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode() + weights).hexdigest()


def _grid_words(grid: Tensor) -> str:
    first = ", ".join(f"{float(t):.4f}" for t in grid[:3])
    return f"{len(grid) - 1} steps ({first}, ...)"
