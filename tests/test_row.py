import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lesa.row import CPU_SCRATCH, History, combine

SHAPE = (2, 5, 7)


def filled(memory: int, features: list[Tensor]) -> History:
    history = History(memory, like=features[0])
    for step, feature in enumerate(features):
        history.append(step, feature)
    return history


def random_features(count: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for _ in range(count)]


def test_a_history_holds_the_newest_features_oldest_first():
    features = random_features(7)
    history = History(3, like=features[0])
    for step, feature in enumerate(features):
        history.append(10 + step, feature)
        newest = range(max(0, step - 2), step + 1)
        assert history.steps == [10 + k for k in newest]
        assert all(torch.equal(held, features[k]) for held, k in zip(history.features(), newest, strict=True))


def test_a_history_copies_what_it_is_given():
    feature = torch.ones(SHAPE)
    history = filled(2, [feature])
    feature.fill_(5.0)
    assert torch.equal(history.features()[0], torch.ones(SHAPE))


def test_a_cleared_history_keeps_its_storage():
    history = filled(2, random_features(3))
    before = history.features()[0].untyped_storage().data_ptr()
    history.clear()
    assert history.steps == [] and history.features() == []
    history.append(0, torch.ones(SHAPE))
    assert history.features()[0].untyped_storage().data_ptr() == before


def test_a_history_fits_features_of_its_shape_dtype_and_memory_only():
    history = History(3, like=torch.empty(SHAPE, dtype=torch.bfloat16))
    assert history.fits(3, torch.empty(SHAPE, dtype=torch.bfloat16))
    assert not history.fits(2, torch.empty(SHAPE, dtype=torch.bfloat16))
    assert not history.fits(3, torch.empty(SHAPE))
    assert not history.fits(3, torch.empty(2, 5, 6, dtype=torch.bfloat16))
    assert not history.fits(3, torch.empty(SHAPE, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 1024, 200)])
def test_bytes_held_are_the_ring_and_the_scratch(shape):
    elements = shape[0] * shape[1] * shape[2]
    history = History(4, like=torch.empty(shape, dtype=torch.bfloat16))
    assert history.nbytes == 4 * elements * 2 + min(elements, CPU_SCRATCH) * 4


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_a_forecast_is_the_weighted_sum_whatever_the_size_of_the_pieces(pieces):
    features = random_features(3, dtype=torch.float64)
    elements = features[0].numel()
    scratch = torch.empty(max(1, elements // pieces), dtype=torch.float64)
    forecast = combine(features, [2.0, 0.0, -0.5], 0.25, scratch)
    assert torch.allclose(forecast, 2.0 * features[0] - 0.5 * features[2] + 0.25, rtol=0, atol=1e-12)


def test_a_forecast_takes_one_coefficient_for_each_feature():
    history = filled(3, random_features(2))
    with pytest.raises(ValueError, match="argument 2 is longer"):
        history.forecast([1.0, 2.0, 3.0], 0.0)


def test_a_zero_coefficient_keeps_a_spoiled_feature_out():
    good, spoiled = torch.ones(SHAPE), torch.full(SHAPE, torch.nan)
    assert torch.equal(filled(2, [spoiled, good]).forecast([0.0, 3.0], 0.0), 3.0 * good)


def test_forecasts_in_bfloat16_are_rounded_once():
    """With sum |c| in the hundreds, as Taylor rows have, bfloat16 sums would be off by whole numbers."""
    features, coefficients = random_features(3, dtype=torch.bfloat16), [100.25, -202.5, 103.25]
    exact = sum(c * f.double() for c, f in zip(coefficients, features, strict=True))
    forecast = filled(3, features).forecast(coefficients, 0.125)
    assert forecast.dtype == torch.bfloat16
    half_a_unit = (exact + 0.125).abs() * 2.0**-8
    assert ((forecast.double() - exact - 0.125).abs() <= half_a_unit * 1.01 + 1e-4).all()


def test_forecasts_in_float64_lose_nothing():
    features, coefficients = random_features(2, dtype=torch.float64), [1 / 3, 2 / 3]
    exact = features[0] / 3 + features[1] * 2 / 3
    assert torch.allclose(filled(2, features).forecast(coefficients, 0.0), exact, rtol=0, atol=1e-14)


def test_a_history_is_writable_in_and_out_of_inference_mode():
    with torch.inference_mode():
        history = filled(2, [torch.ones(SHAPE)])
    history.append(1, torch.full(SHAPE, 3.0))
    assert torch.equal(history.forecast([-1.0, 2.0], 0.0), torch.full(SHAPE, 5.0))
    with torch.inference_mode():
        history.append(2, torch.zeros(SHAPE))


def test_a_history_keeps_no_graph():
    feature = torch.ones(SHAPE, requires_grad=True) * 2
    history = filled(2, [feature])
    assert not history.features()[0].requires_grad
    assert not history.forecast([1.0], 0.0).requires_grad


class Reads(TorchDispatchMode):
    """Count, per storage, the elements that operations read, and list the storages made on the way."""

    def __init__(self, watched: list[Tensor]):
        super().__init__()
        self.read = {tensor.data_ptr(): 0 for tensor in watched}
        self.extent = {tensor.data_ptr(): tensor.nbytes for tensor in watched}
        self.made: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.empty_like.default, torch.ops.aten.empty.memory_format):
            self.made.append(result.nbytes)
        elif not function.is_view:
            for start, tensor in ((s, t) for s in self.read for t in args if isinstance(t, Tensor)):
                if start <= tensor.data_ptr() < start + self.extent[start]:
                    self.read[start] += tensor.numel()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forecast_reads_each_feature_once_and_makes_one(dtype):
    features = random_features(3, shape=(1, 1000, 700), dtype=dtype)
    history = filled(3, features)
    assert features[0].numel() > 2 * CPU_SCRATCH, "several pieces"
    with Reads(history.features()) as seen:
        history.forecast([1.0, -2.0, 2.0], 0.5)
    assert list(seen.read.values()) == [features[0].numel()] * 3
    assert seen.made == [features[0].nbytes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forecast_needs_one_feature_of_memory_beside_pieces_of_fixed_size(dtype):
    """By the allocator's own account: to widen a piece, a CPU takes one as large as the scratch and gives it back."""
    history = filled(3, random_features(3, shape=(1, 2000, 700), dtype=dtype))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        forecast = history.forecast([1.0, -2.0, 2.0], 0.5)
    made = [event.cpu_memory_usage for event in run.events() or () if event.name == "aten::empty_strided"]
    assert forecast.nbytes > 4 * CPU_SCRATCH
    assert [size for size in made if size > 4 * CPU_SCRATCH] == [forecast.nbytes]
    assert len(made) == 1 or dtype == torch.bfloat16
