"""Predictors: the forecasters that are learned, what they are held against, and how they are saved."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from lesa.predictors import disk, hub
from lesa.predictors.disk import DAMAGED, write_atomically
from lesa.predictors.origin import Origin, configuration
from lesa.rows.forecasters import Forecaster
from lesa.rows.grid import in_words, matches, times_in_order
from lesa.rows.guidance import ALL
from lesa.rows.plan import histories
from lesa.rows.row import Row
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "lesa-predictor-1"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FILES, CARD_FILE = (CONFIG_FILE, WEIGHTS_FILE), "README.md"

MOST_PARTS = 1000
"""A predictor of more parts is a mistake, or meant to take all time: two streams of 3 stages have 12."""
MOST_BYTES = 1 << 20
"""Of `config.json`; one for eight grids has 11 kB."""

KINDS: dict[str, type[Predictor]] = {}
"""The kinds of predictors by their `method`, which `config.json` names."""

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


class Predictor(
    nn.Module, Forecaster, ModelHubMixin, library_name="lesa", tags=["diffusers", "lesa"], model_card_template=CARD
):
    """A learned forecaster, bound to one model, tap, grid and schedule.

    `save_pretrained` and `push_to_hub` are those of huggingface_hub; what they write and `Predictor.from_pretrained`
    reads is `model.safetensors` and `config.json`. As a forecaster it stands for its first stream; `for_stream` gives
    the others.
    """

    method: ClassVar[str]
    of: str = "output"
    """What its rows combine: 'output', what denoisers return (at a tap: the feature), or 'data', what that says."""
    memory: int
    remembers_forecasts: bool

    def __init_subclass__(cls, **options: Any) -> None:
        """Let a kind that has a `method` of its own be found by that name in files."""
        super().__init_subclass__(**options)
        if "method" in cls.__dict__:
            KINDS[cls.method] = cls

    def __init__(self, origin: Origin):
        super().__init__()
        self.origin = origin
        self.grid = times_in_order(origin.grid)
        self.schedule = Schedule.parse(origin.schedule)
        self.begins = tuple(origin.training.get("begins", (0,)))
        self.full = self.full_of(self.schedule, len(self.grid) - 1)
        self.check_parts()

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
        """Return the forecaster of one stream; trained on what passed at the sampler, it is the same for all.

        Raises: ValueError if the predictor was not trained for it.
        """
        if self.origin.streams == (ALL,):
            return _Stream(self, ALL)
        if name not in self.origin.streams:
            raise ValueError(
                f"this predictor was trained for the streams {', '.join(self.origin.streams)}, got {name!r}; train one "
                "on runs with the guidance that you use."
            )
        return _Stream(self, name)

    def full_of(self, schedule: Schedule, steps: int) -> tuple[int, ...]:
        """Return the full steps of a run of so many steps on a schedule; where histories begin they are full anyway."""
        return tuple(sorted({*schedule.full_steps(steps, self.begins[0]), *self.begins}))

    def pasts_of(self, full: Sequence[int], steps: int) -> dict[int, tuple[int, ...]]:
        """Return the steps in the history at every skipped step of a run with these full steps."""
        begins = self.begins
        return dict(histories(steps, full, begins[0], self.memory, self.remembers_forecasts, begins))

    def schedule_for(self, grid: Sequence[float] | Tensor, budget: int | None = None, start: int = 0) -> Schedule:
        """Return the schedule of a run on this grid that begins at `start`; with a `budget`, one of so many full steps.

        Raises: ValueError if there is none such, or the predictor is not for this grid.
        """
        self.check_grid(times_in_order(grid))
        self.check_start(start)
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
                f"this predictor was trained for {in_words(self.grid)}, got {in_words(grid)}; call the pipeline "
                f"with num_inference_steps={len(self.grid) - 1} and the image size it was trained for, or train one."
            )

    def check_start(self, start: int) -> None:
        """Raise ValueError if runs that begin at this step of the grid have no full step there."""
        if self.schedule.rule == "at" and start != self.full[0]:
            raise ValueError(
                f"this predictor was trained for runs from step {self.full[0]} on, with the full steps "
                f"{', '.join(map(str, self.full))}, got one that begins at step {start} (image to image, of another "
                "strength); calibrate or train for such runs."
            )

    @property
    def only_shapes(self) -> bool:
        """Tell whether it is on the `meta` device, where it takes up numbers that are there already."""
        return any(parameter.is_meta for parameter in self.parameters())

    def check_parts(self, *counts: int) -> None:
        """Raise ValueError if each stream has so many stages, each of so many layers, that nobody means it."""
        parts = math.prod((len(self.origin.streams), *counts))
        if parts > MOST_PARTS:
            raise ValueError(
                f"a predictor has at most {MOST_PARTS} parts (streams x stages x layers), got {parts}; name fewer."
            )

    def past(self, step: int) -> list[int]:
        """Return the steps whose features the history holds at a step of a run on the predictor's schedule."""
        begin = max((begin for begin in self.begins if begin <= step), default=0)
        held = range(begin, step) if self.remembers_forecasts else [k for k in self.full if begin <= k < step]
        return list(held[-self.memory :])

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
        if tap != mine.tap and (tap.modules or mine.tap.modules):
            raise ValueError(
                f"this predictor was trained for the feature at {tuple(mine.tap)}, got the tap {tuple(tap)}; "
                "accelerate with the predictor's tap, or train one for this."
            )

    def slopes(self) -> Tensor:
        """Return alpha of the line through the two newest full steps before each step, (S,); 0 where there are fewer.

        With it h_s = h_new + alpha (h_new - h_old).
        """
        slopes = [0.0] * (len(self.grid) - 1)
        for step in range(len(slopes)):
            begin = max((begin for begin in self.begins if begin <= step), default=0)
            newest = [k for k in self.full if begin <= k < step][-2:]
            if len(newest) == 2:
                slopes[step] = (step - newest[1]) / (newest[1] - newest[0])
        return torch.tensor(slopes)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load the predictor in a folder or a repository of the hub; options as of `hf_hub_download`.

        Raises: FileNotFoundError if there is none; ValueError if it is damaged or of another kind.
        """
        source = str(pretrained_model_name_or_path)
        config, weights = (_fetch(source, name, options) for name in (CONFIG_FILE, WEIGHTS_FILE))
        _check_bytes(config, config.stat().st_size, "fetch or train it again")
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
        if _describes_what_is_there(folder := Path(save_directory)):
            (folder / CARD_FILE).unlink()  # written anew, for this one; nobody has changed it
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        entries, weights = self._contents()
        entries["sha256"] = _digest(entries, weights)
        config = (json.dumps(entries, indent=1) + "\n").encode()
        _check_bytes(save_directory / CONFIG_FILE, len(config), "shorten what it says of its training")
        write_atomically(save_directory / WEIGHTS_FILE, weights)
        write_atomically(save_directory / CONFIG_FILE, config)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Describe the predictor for people; `save_pretrained` writes it where there is no README.md that somebody
        changed."""
        return super().generate_model_card(*args, predictor=self, **kwargs)


def _describes_what_is_there(folder: Path) -> bool:
    """Tell whether a folder's card is the one that was written with the predictor in it."""
    try:
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        return card == str(Predictor.from_pretrained(folder).generate_model_card())
    except (OSError, *DAMAGED):
        return False


class _Stream(Forecaster):
    """One stream of a predictor."""

    def __init__(self, predictor: Predictor, name: str):
        self._predictor, self._name = predictor, name
        self.begins = predictor.begins
        self.memory, self.remembers_forecasts = predictor.memory, predictor.remembers_forecasts

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        return self.rows_of(grid, {step: past})[step]

    def rows_of(self, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        self._predictor.check_grid(grid)
        for step, past in pasts.items():
            self._predictor.check_past(step, past)
        return self._predictor.stream_rows(self._name, grid, pasts)

    def correction(self, grid: Tensor, step: int, past: Sequence[int]) -> Row | None:
        return self._predictor.correction(grid, step, past)  # at the sampler all streams are one

    def wants(self, grid: Tensor, step: int) -> int:
        return self._predictor.wants(grid, step)

    def __repr__(self) -> str:
        return f"{self._predictor!r}.for_stream({self._name!r})"


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
    try:
        entries = json.loads(config)
        if entries.get("format") != FORMAT:
            raise ValueError(f"its format is {entries.get('format')!r}, not {FORMAT!r}")
        if entries.pop("sha256", None) != _digest(entries, weights):
            raise ValueError("its files are not as they were saved")
        kind = KINDS[entries.pop("method")]
        options = entries.pop("options")
        del entries["format"]
        predictor = _around(from_bytes(weights), kind, Origin.from_dict(entries), options)
    except DAMAGED as error:
        raise ValueError(f"{source} holds no whole predictor of lesa ({error}); fetch or train it again.") from error
    return predictor.eval()


def _check_bytes(config: Path, count: int, advice: str) -> None:
    if count > MOST_BYTES:
        raise ValueError(f"{config} has at most {MOST_BYTES} bytes, got {count}; {advice}.")


def _around(
    weights: Mapping[str, Tensor], kind: type[Predictor], origin: Origin, options: Mapping[str, Any]
) -> Predictor:
    """Make a predictor around its weights: its options may claim any size, and nothing of it is made.

    Raises: ValueError if the weights have other names or shapes than the options say.
    """
    with torch.device("meta"):
        predictor = kind(origin, **options)
    said, found = ({k: tuple(t.shape) for k, t in some.items()} for some in (predictor.state_dict(), weights))
    if other := sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name)):
        name = other[0]
        raise ValueError(
            f"its options say that the weights of {name!r} are of shape {said.get(name)}, they are of {found.get(name)}"
        )
    if other := sorted(name for name, tensor in weights.items() if not tensor.isfinite().all()):
        raise ValueError(f"the weights of {other[0]!r} are finite numbers, got NaN or infinity")
    kinds = {name: tensor.dtype for name, tensor in predictor.state_dict().items()}
    predictor.load_state_dict({name: tensor.to(kinds[name]) for name, tensor in weights.items()}, assign=True)
    return predictor


def _fetch(source: str, name: str, options: Mapping[str, Any]) -> Path:
    if Path(source).is_dir():
        if not (Path(source) / name).exists():
            raise FileNotFoundError(
                f"{source} holds no {name}, so no predictor of lesa; name its folder, or train one."
            )
        return Path(source) / name
    where = hub.how(source, "a predictor")
    try:
        return Path(hf_hub_download(source, name, **{**where, **options}))
    except (OSError, ValueError) as error:
        why = "which cannot be reached from here" if where else f"{error}"
        raise FileNotFoundError(
            f"{source} is neither a folder here nor a predictor on the hub ({why}); check its name."
        ) from error


def _without_loss(tensor: Tensor) -> Tensor:
    """Store as few bytes as no number changes by."""
    for narrow in (tensor.half(), tensor.float()):
        if torch.equal(narrow.to(tensor.dtype), tensor):
            return narrow.contiguous()
    return tensor.contiguous()


def _digest(entries: Mapping[str, Any], weights: bytes) -> str:
    """Return the SHA-256 of a predictor, however its JSON is laid out."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode() + weights).hexdigest()
