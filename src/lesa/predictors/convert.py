"""Make a predictor of ours of one that was trained with the released code of LESA's authors.

Their file is a pickle of a dict: under `model` the weights, beside them optimiser, scheduler and configuration. It is
read by torch's unpickler for weights alone, which runs nothing: it knows tensors, plain containers and numbers, and the
four classes of their configuration by inert ones in their place. A file that names anything else is refused.

Weights carry over one to one, the knots of each input too: these were stored in bfloat16, 1.7969 for 1.8. What the file
does not know has to be said: the grid, the schedule, the bounds between stages, and the tap.

The paper's equations number the past features from the newest on, h_s = h_{s-1} + alpha (sum_k w_k h_{s-k} + b). A file
whose weights were applied to a history in the order of time has them the other way round.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import reprlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lesa.predictors.lesa import LESA
from lesa.predictors.origin import Origin
from lesa.rows.grid import validate
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

ORDERS = ("newest", "oldest")
"""Which past feature the first of a stage's weights belongs to."""
CUBIC = 3
CONFIG_MODULE = "predictor.model.config"
CONFIG_CLASSES = ("Config", "ModelConfig", "KANConfig", "SolverConfig")
KEY = re.compile(
    r"(?P<part>latent|timestep)(?:_(?P<stream>cond|uncond))?\.(?P<stage>\d+)\."
    r"(?:(?P<linear>weight|bias)|layers\.(?P<layer>\d+)\.(?P<kan>grid|base_weight|spline_weight|spline_scaler))"
)
DIMENSIONS = {"weight": 2, "bias": 1, "grid": 2, "base_weight": 2, "spline_weight": 3, "spline_scaler": 2}
OURS = {"grid": "knots", "base_weight": "base", "spline_weight": "spline", "spline_scaler": "scale"}


class _Inert:
    """Stands for a class of the authors' configuration: takes whatever it is given, and does and keeps nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any):
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class Described(Protocol):
    """The model that a predictor is for, as far as it matters here: `lesa.bench.models.Model` is one."""

    @property
    def name(self) -> str: ...

    @property
    def transformer(self) -> str:
        """The name of the transformer's class."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """What the transformer is built with."""
        ...


class Weights(NamedTuple):
    """A predictor's weights in a file of the authors, in float32 and under our names, and the file's digest."""

    tensors: dict[str, Tensor]
    digest: str
    file: str = ""

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(sorted({name.split(".")[1] for name in self.tensors}))

    @property
    def stages(self) -> int:
        return 1 + max(int(name.split(".")[2]) for name in self.tensors)

    def of_kan(self, name: str) -> list[Tensor]:
        """Return one tensor of each layer of the first KAN."""
        start = f"experts.{self.streams[0]}.0.kan."
        found = sorted(key for key in self.tensors if key.startswith(start) and key.endswith(f".{name}"))
        return [self.tensors[key] for key in found]


def read(path: str | Path) -> Weights:
    """Read the weights in a file of the authors; nothing in it is executed.

    Raises: FileNotFoundError if there is none; ValueError if it is damaged, names anything but tensors and their
        configuration, or holds other weights than those of a predictor.
    """
    allowed: list[Any] = [type(name, (_Inert,), {"__module__": CONFIG_MODULE}) for name in CONFIG_CLASSES]
    data = Path(path).read_bytes()
    _check_packed(path, data)
    try:
        with torch.serialization.safe_globals(allowed):
            entries = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a file may be damaged, or hostile, in any way
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"one that names {named[1]}" if named else f"{type(error).__name__}: {str(error).splitlines()[:1]}"
        raise ValueError(
            f"{path} is refused, and nothing in it was run: a checkpoint of LESA's authors holds tensors, numbers and "
            f"their configuration alone, got {reason}."
        ) from error
    found = entries.get("model") if isinstance(entries, Mapping) else None
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path} has its weights under 'model', got {_kind(entries)}; name a whole checkpoint.")
    _check_size(path, found, len(data))
    try:
        tensors = dict(_renamed(name, tensor) for name, tensor in found.items())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    weights = Weights(tensors, hashlib.sha256(data).hexdigest(), str(path))
    if len(weights.tensors) != len(found) or "cond" not in weights.streams:
        raise ValueError(f"{path} has one stream, without a name, or both cond and uncond, got others beside or alone.")
    return weights


def _check_packed(path: str | Path, data: bytes) -> None:
    """Raise ValueError if a file would unpack to more than it is, as torch compresses nothing, or is damaged."""
    try:
        packed = zipfile.ZipFile(io.BytesIO(data))
    except Exception:  # an older format of torch, another file, or a damaged one: torch tells
        return
    with packed:
        unpacked = sum(part.file_size for part in packed.infolist())
        if unpacked > len(data):
            raise ValueError(
                f"{path} is refused, and nothing in it was run: a checkpoint is stored as it is, got {len(data)} bytes "
                f"that unpack to {unpacked}."
            )
        try:
            damaged = packed.testzip()
        except Exception as error:
            damaged = str(error)
    if damaged:
        raise ValueError(f"{path} is damaged, in {damaged}: its checksums say so; fetch it again.")


def _check_size(path: str | Path, tensors: Mapping[Any, Any], size: int) -> None:
    """Raise ValueError if tensors have more numbers than their file has bytes: views can repeat one number for ever."""
    count = sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, Tensor))
    if count > size:
        raise ValueError(
            f"{path} is refused: a checkpoint holds every number of its weights, got {size} bytes that claim to be "
            f"{count} numbers."
        )


def _renamed(name: Any, tensor: Any) -> tuple[str, Tensor]:
    """Return a weight under our name and in float32."""
    match = KEY.fullmatch(name) if isinstance(name, str) else None
    if match is None or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise ValueError(
            "a checkpoint's weights are named latent.STAGE.weight or .bias and timestep.STAGE.layers.LAYER."
            f"{{{','.join(OURS)}}}, with _cond or _uncond where there are two streams, got "
            f"{reprlib.repr(name)}, {_kind(tensor)}."
        )
    if tensor.ndim != DIMENSIONS[match["linear"] or match["kan"]]:
        raise ValueError(f"{name!r} has another number of dimensions in a checkpoint, got {tuple(tensor.shape)}.")
    here = f"experts.{match['stream'] or 'cond'}.{match['stage']}"
    if match["linear"] and match["part"] == "latent":
        return f"{here}.{match['linear']}", tensor.detach().float().squeeze(0)
    if match["kan"] and match["part"] == "timestep":
        return f"{here}.kan.{match['layer']}.{OURS[match['kan']]}", tensor.detach().float()
    raise ValueError(f"weights are parts of a latent or a timestep module each, got {name!r}; name a whole checkpoint.")


def convert(
    weights: Weights,
    model: Described,
    tap: Tap,
    grid: Sequence[float] | Tensor,
    schedule: Schedule,
    *,
    bounds: Sequence[float] | None = None,
    order: str = "newest",
    training: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> LESA:
    """Make a LESA of the authors' weights; in float32 its rows are theirs.

    `bounds` are by default the paper's for the class of transformers; `order` says which past feature a stage's first
    weight belongs to. The authors' KANs are made for S + 1 times, and some of their scripts hand them S. Where a file's
    take S, all but the last time, 0, the missing input is added with weights of 0, which changes no number.

    Raises: ValueError if weights are missing or of other shapes than the rest, or do not fit the grid or the bounds.
    """
    if order not in ORDERS:
        raise ValueError(f"an order is one of {', '.join(ORDERS)}, got {order!r}; name one of these.")
    try:
        return _converted(weights, model, tap, grid, schedule, bounds, order, training or {}, versions or {})
    except ValueError as error:
        raise (ValueError(f"{weights.file}: {error}") if weights.file else error) from error


def _converted(
    weights: Weights,
    model: Described,
    tap: Tap,
    grid: Sequence[float] | Tensor,
    schedule: Schedule,
    bounds: Sequence[float] | None,
    order: str,
    training: Mapping[str, Any],
    versions: Mapping[str, str],
) -> LESA:
    times = validate(grid)
    shape = _kan_shape(weights)
    tensors = {k: _fitted(k, tensor, order, len(times), shape.inputs) for k, tensor in weights.tensors.items()}
    first = f"experts.{weights.streams[0]}"
    memories = [len(_get(tensors, f"{first}.{stage}.weight")) for stage in range(weights.stages)]
    origin = Origin(
        model=model.name,
        transformer=model.transformer,
        config=json.loads(json.dumps({k: v for k, v in model.config.items() if not k.startswith("_")})),
        tap=tap,
        grid=tuple(times.tolist()),
        schedule=str(schedule),
        streams=weights.streams,
        training={**training, "converted": weights.digest, "order": order},
        versions=dict(versions),
    )
    options = dict(hidden=shape.hidden, grid_size=shape.grid_size, span=shape.span)
    with torch.device("meta"):  # made of no memory until its weights are known to be there
        predictor = LESA.paper(origin, bounds=bounds, memories=memories, **options)
    _load(predictor, tensors)
    return predictor.eval()


class _Shape(NamedTuple):
    """How a KAN is built."""

    inputs: int
    hidden: tuple[int, ...]
    grid_size: int
    span: tuple[float, float]


def _kan_shape(weights: Weights) -> _Shape:
    """Read from the first KAN's tensors how all are built."""
    bases, knots, splines = (weights.of_kan(name) for name in ("base", "knots", "spline"))
    if not bases or not knots or not splines:
        raise ValueError("a KAN's layers have grid, base_weight and spline_weight, got none whole; name a checkpoint.")
    order = knots[0].shape[-1] - splines[0].shape[-1] - 1
    if order != CUBIC or len(bases[-1]) != 1:
        raise ValueError(
            f"the authors' KANs are of cubic splines and give one number, got degree {order} and {len(bases[-1])} "
            "numbers; only such can be converted."
        )
    line = knots[0][0]
    span = float(line[CUBIC]), float(line[-CUBIC - 1])
    return _Shape(bases[0].shape[1], tuple(len(base) for base in bases[:-1]), splines[0].shape[-1] - CUBIC, span)


def _fitted(name: str, tensor: Tensor, order: str, times: int, inputs: int) -> Tensor:
    """Return a tensor as ours are: past features oldest first, KANs of all times."""
    if name.endswith(".weight"):
        return tensor.flip(0) if order == "newest" else tensor
    return _of_all_times(name, tensor, times, inputs) if ".kan.0." in name else tensor


def _of_all_times(name: str, tensor: Tensor, times: int, inputs: int) -> Tensor:
    """Return a first layer's tensor for all S + 1 times of a grid, if it is for those or for all but the last."""
    if inputs == times:
        return tensor
    if inputs != times - 1:
        raise ValueError(
            f"this predictor's KANs take {inputs} times, so it is for a grid of {inputs - 1} or {inputs} steps, got "
            f"one of {times - 1}; pass the grid that it was trained for."
        )
    if name.endswith(".knots"):
        return torch.cat([tensor, tensor[-1:]])
    return functional.pad(tensor, (0, 0, 0, 1) if tensor.ndim == 3 else (0, 1))


def _load(predictor: LESA, tensors: Mapping[str, Tensor]) -> None:
    """Set all of a predictor's numbers."""
    wanted = predictor.state_dict()
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"every stage and stream has a KAN of as many layers, got {extra[0]!r} beside them.")
    for name, like in wanted.items():
        tensor = _get(tensors, name)
        if tensor.shape != like.shape or not tensor.isfinite().all():
            raise ValueError(
                f"the weights of {name!r} are finite numbers of shape {tuple(like.shape)}, as those of the first stage "
                f"say, got shape {tuple(tensor.shape)}; the checkpoint is damaged, or of another predictor."
            )
        if name.endswith(".knots") and not (tensor.diff() > 0).all():
            raise ValueError(f"the knots of {name!r} rise, got others; the checkpoint is damaged.")
    predictor.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"a checkpoint has all weights of its predictor, got none for {name!r}; name a whole one.")
    return tensors[name]


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(reprlib.repr, list(value)[:8]))}"
    return f"a {type(value).__name__}"
