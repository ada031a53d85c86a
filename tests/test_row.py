from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lesa.rows.row import CPU_SCRATCH, STORAGES, History, Storage, Term, combine

SHAPE = (2, 5, 7)
PLAIN = ["model", "cpu"]
DIFFERENCES = ["int8", "fp8", "int8-cpu", "fp8-cpu"]
each_storage = pytest.mark.parametrize("name", STORAGES)
each_plain = pytest.mark.parametrize("name", PLAIN)
each_of_differences = pytest.mark.parametrize("name", DIFFERENCES)
STEP = {"int8": 1 / 127 / 2, "fp8": 1 / 16}
"""Half the distance of neighbouring codes, as a share of the token's largest element."""


def make(slots: int, like: Tensor, name: str = "model") -> History:
    return Storage.parse(name).history(slots, like)


def filled(slots: int, features: list[Tensor], name: str = "model") -> History:
    history = make(slots, features[0], name)
    for step, feature in enumerate(features):
        history.append(step, feature)
    return history


def held(history: History) -> list[Tensor]:
    """The features, read one by one."""
    return [history.forecast([step], [1.0], 0.0) for step in history.steps]


def random_features(count: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for _ in range(count)]


def test_each_storage_has_its_history():
    assert {name for name in STORAGES if make(2, torch.empty(SHAPE), name).storage.of_differences} == {*DIFFERENCES}
    with pytest.raises(ValueError, match="one of model, int8, fp8, cpu, int8-cpu, fp8-cpu, got 'int4'"):
        Storage.parse("int4")


@each_plain
def test_a_history_holds_what_it_is_told_to_keep(name):
    features = random_features(6)
    history = make(3, features[0], name)
    for step, (feature, kept) in enumerate(zip(features, [[], [0], [0, 1], [0, 2], [2, 3], []], strict=True)):
        history.keep(kept)
        history.append(step, feature)
        assert history.steps == [*kept, step]
        assert all(torch.equal(one, features[k]) for one, k in zip(held(history), history.steps, strict=True))


@each_of_differences
def test_a_history_of_differences_lets_only_the_oldest_go(name):
    features = random_features(5)
    history = filled(5, features, name)
    before = held(history)
    history.keep([1, 3, 4])
    assert history.steps == [1, 2, 3, 4]
    assert all(torch.equal(one, other) for one, other in zip(held(history), before[1:], strict=True))
    history.keep([])
    assert history.steps == []


@each_storage
def test_a_full_history_takes_no_more(name):
    history = filled(2, random_features(2), name)
    with pytest.raises(IndexError):
        history.append(2, torch.ones(SHAPE))


@each_storage
def test_a_history_copies_what_it_is_given(name):
    feature = torch.ones(SHAPE)
    history = filled(2, [feature], name)
    feature.fill_(5.0)
    assert torch.equal(held(history)[0], torch.ones(SHAPE))


@each_storage
def test_a_history_takes_features_of_another_dtype_and_loses_nothing(name):
    """The storage is as wide as the widest of them."""
    narrow, wide = random_features(1, dtype=torch.bfloat16)[0], random_features(2)[1]
    history = filled(3, [narrow, wide, wide], name)
    assert history.fits(wide) and history.fits(narrow)
    assert held(history)[-1].dtype == torch.float32
    if name in PLAIN:
        assert torch.equal(held(history)[0], narrow.float())
    assert torch.equal(held(history)[-1], wide)
    assert history.nbytes > filled(3, [narrow] * 3, name).nbytes or name.endswith("cpu")


def test_a_history_takes_no_features_of_another_shape_or_device():
    history = make(3, torch.empty(SHAPE))
    assert not history.fits(torch.empty(2, 5, 6))
    assert not history.fits(torch.empty(SHAPE, device="meta"))


@pytest.mark.parametrize(("tokens", "scratch"), [(12, 2400), (100, 16_200), (2048, 51_200), (11_000, 262_000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@each_storage
def test_bytes_held_are_counted_to_the_last_one(name, dtype, tokens, scratch):
    like = torch.empty((1, tokens, 200), dtype=dtype)
    older = 3 * (like.numel() + 4 * tokens) if name in DIFFERENCES else 3 * like.nbytes
    assert make(4, like, name).nbytes == like.nbytes + older + 4 * scratch


def test_bytes_on_the_cpu_are_none_of_another_devices():
    like = torch.empty((1, 100, 200), device="meta")
    assert make(4, like, "cpu").nbytes == make(0, like).nbytes == 4 * 16_200


# --- forecasts


@pytest.mark.parametrize("pieces", [1, 3, 10])
def test_a_sum_is_that_of_its_terms_whatever_the_size_of_the_pieces(pieces):
    torch.manual_seed(0)
    first, second = torch.randn(2, 10, 7, dtype=torch.float64)
    codes, scale = torch.randint(-127, 128, (10, 7), dtype=torch.int8), torch.rand(10, 1, dtype=torch.float64)
    scratch, forecast = torch.empty(-(-10 // pieces), 7, dtype=torch.float64), torch.empty(10, 7, dtype=torch.float64)
    combine([Term(first, 2.0), Term(second, -0.5), Term(codes, 3.0, scale)], 0.25, forecast, scratch)
    torch.testing.assert_close(forecast, 2.0 * first - 0.5 * second + 3.0 * scale * codes + 0.25, rtol=0, atol=1e-12)


@each_storage
def test_a_forecast_takes_one_coefficient_for_each_step_held(name):
    history = filled(3, random_features(2), name)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        history.forecast([0, 1], [1.0, 2.0, 3.0], 0.0)
    with pytest.raises(KeyError, match=r"steps \[7\] count and are not held, but \[0, 1\]"):
        history.forecast([0, 1, 7], [1.0, 2.0, 3.0], 0.0)


@each_storage
def test_where_a_coefficient_is_zero_none_need_be_held(name):
    features = random_features(3)
    history = filled(3, features, name)
    expected = history.forecast([1, 2], [-1.0, 2.0], 0.5)
    history.keep([1, 2])
    assert torch.equal(history.forecast([0, 1, 2], [0.0, -1.0, 2.0], 0.5), expected)


@each_storage
def test_a_row_of_zeros_needs_no_feature(name):
    forecast = make(0, torch.empty(SHAPE, dtype=torch.bfloat16), name).forecast([3, 4], [0.0, 0.0], 2.5)
    assert torch.equal(forecast, torch.full(SHAPE, 2.5, dtype=torch.bfloat16))


@each_plain
def test_a_zero_coefficient_keeps_a_spoiled_feature_out(name):
    good, spoiled = torch.ones(SHAPE), torch.full(SHAPE, torch.nan)
    assert torch.equal(filled(2, [spoiled, good], name).forecast([0, 1], [0.0, 3.0], 0.0), 3.0 * good)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_storage
def test_a_spoiled_feature_never_looks_whole(name, value):
    features = random_features(3)
    features[0][1, 2, 3] = value
    forecast = filled(3, features, name).forecast([0, 1, 2], [1.0, 1.0, 1.0], 0.0)
    assert not forecast[1, 2, 3].isfinite()
    assert forecast[0].isfinite().all()


@each_plain
def test_forecasts_in_bfloat16_are_rounded_once(name):
    """With sum |c| in the hundreds, as Taylor rows have, bfloat16 sums would be off by whole numbers."""
    features, coefficients = random_features(3, dtype=torch.bfloat16), [100.25, -202.5, 103.25]
    exact = sum(c * f.double() for c, f in zip(coefficients, features, strict=True))
    forecast = filled(3, features, name).forecast([0, 1, 2], coefficients, 0.125)
    assert forecast.dtype == torch.bfloat16
    half_a_unit = (exact + 0.125).abs() * 2.0**-8
    assert ((forecast.double() - exact - 0.125).abs() <= half_a_unit * 1.01 + 1e-4).all()


@each_plain
def test_forecasts_in_float64_lose_nothing(name):
    features, coefficients = random_features(2, dtype=torch.float64), [1 / 3, 2 / 3]
    exact = features[0] / 3 + features[1] * 2 / 3
    assert torch.allclose(filled(2, features, name).forecast([0, 1], coefficients, 0.0), exact, rtol=0, atol=1e-14)


@each_storage
def test_a_history_is_writable_in_and_out_of_inference_mode(name):
    with torch.inference_mode():
        history = filled(3, [torch.ones(SHAPE)], name)
    history.append(1, torch.full(SHAPE, 3.0))
    torch.testing.assert_close(history.forecast([0, 1], [-1.0, 2.0], 0.0), torch.full(SHAPE, 5.0))
    with torch.inference_mode():
        history.append(2, torch.zeros(SHAPE))


@each_storage
def test_a_history_keeps_no_graph(name):
    feature = torch.ones(SHAPE, requires_grad=True) * 2
    history = filled(3, [feature, feature * 3], name)
    assert not any(tensor.requires_grad for tensor in history._tensors())
    assert not history.forecast([0, 1], [1.0, 1.0], 0.0).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_storage
def test_a_forecast_may_have_another_dtype_than_the_features(name, dtype):
    features, coefficients = random_features(3), [100.25, -202.5, 103.25]
    history = filled(3, features, name)
    forecast = history.forecast([0, 1, 2], coefficients, 0.125, dtype)
    assert torch.equal(forecast, history.forecast([0, 1, 2], coefficients, 0.125).to(dtype)), "rounded once"
    assert forecast.dtype == dtype and not history.clamped


@pytest.mark.parametrize("shape", [SHAPE, (1, 3000, 40)], ids=["one piece", "several"])
@each_storage
def test_a_forecast_beyond_its_dtypes_range_is_clamped_and_said(name, shape):
    features = [torch.full(shape, value, dtype=torch.float16) for value in (-100.0, 60_000.0)]
    features[-1][0, -1, -1] = -60_000.0
    history = filled(2, features, name)
    forecast = history.forecast([0, 1], [0.0, 2.0], 0.0)
    assert set(forecast.unique().tolist()) == {65_504.0, -65_504.0} and history.clamped
    assert history.forecast([0, 1], [0.0, 1.0], 0.0).max() == 60_000.0 and not history.clamped
    assert history.forecast([0, 1], [0.0, 2.0], 0.0, torch.float32).max() == 120_000.0 and not history.clamped


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@each_plain
def test_what_came_in_spoiled_is_not_clamped(name, value):
    features = random_features(2, dtype=torch.float16)
    features[0][1, 2, 3] = value
    history = filled(2, features, name)
    forecast = history.forecast([0, 1], [1.0, 1.0], 0.0)
    assert not forecast[1, 2, 3].isfinite() and forecast.isfinite().sum() == forecast.numel() - 1
    assert not history.clamped


# --- differences


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_of_differences
def test_differences_are_off_by_no_more_than_their_own_rounding(name, dtype):
    """A forecast errs by half a code of each difference, times the weight that it has there, and no more."""
    torch.manual_seed(0)
    base, slope = 10 * torch.randn(SHAPE), torch.randn(SHAPE)
    features = [(base + step * slope + 0.1 * torch.randn(SHAPE)).to(dtype) for step in range(5)]
    coefficients = [0.5, -1.0, 2.0, -3.0, 2.5]
    history = filled(5, features, name)
    exact = sum(c * f.double() for c, f in zip(coefficients, features, strict=True))
    differences = [newer.double() - older.double() for older, newer in pairwise(features)]
    weights = [abs(sum(coefficients[: k + 1])) for k in range(4)]
    share = STEP[name.removesuffix("-cpu")]
    bound = sum(w * share * d.abs().amax(-1, keepdim=True) for w, d in zip(weights, differences, strict=True))
    error = (history.forecast(range(5), coefficients, 0.0).double() - exact).abs()
    assert (error <= bound * 1.01 + exact.abs() * torch.finfo(dtype).eps + 1e-5).all()
    assert error.max() > 1e-4, "they are rounded"


@each_of_differences
def test_the_newest_feature_is_exact(name):
    features = random_features(4, dtype=torch.bfloat16)
    history = make(4, features[0], name)
    for step, feature in enumerate(features):
        history.append(step, feature)
        assert torch.equal(held(history)[-1], feature)


@each_of_differences
def test_what_the_codes_can_hold_is_exact(name):
    """Powers of two, and a token that does not change."""
    first = torch.randn(SHAPE)
    first[0, 0] = 0.0
    step = torch.full(SHAPE, 0.5)
    step[:, 1] = 0.0
    features = [first, first + step, first + 3 * step]
    for one, feature in zip(held(filled(3, features, name)), features, strict=True):
        torch.testing.assert_close(one, feature, rtol=0, atol=1e-6)


def test_older_features_are_not_rounded_again():
    """A feature read late is off by the same codes as one read early, plus those of the differences that came after."""
    torch.manual_seed(0)
    features = [torch.randn(SHAPE), torch.randn(SHAPE)]
    history = filled(20, features, "int8")
    early = held(history)[0]
    for step in range(2, 20):
        history.append(step, features[1])  # nothing changes any more: no difference, no rounding
    torch.testing.assert_close(held(history)[0], early, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [SHAPE, (1, 3000, 40), (1, 15_000, 40), (2, 1, CPU_SCRATCH + 1)])
@each_storage
def test_pieces_change_nothing(name, shape, monkeypatch):
    """Also where a single token is larger than the scratch would be."""
    features = random_features(3, shape)
    forecast = filled(3, features, name).forecast([0, 1, 2], [1.0, -3.0, 3.0], 0.5)
    monkeypatch.setattr("lesa.rows.row.CPU_SCRATCH", 1 << 21)
    monkeypatch.setattr("lesa.rows.row.LEAST", 1 << 21)
    whole = filled(3, features, name)
    assert torch.equal(whole.forecast([0, 1, 2], [1.0, -3.0, 3.0], 0.5), forecast)


# --- what it costs


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
@each_storage
def test_a_forecast_reads_each_feature_once_and_makes_one(name, dtype):
    features = random_features(3, shape=(1, 1000, 700), dtype=dtype)
    history = filled(3, features, name)
    assert features[0].numel() > 2 * history._scratch.numel(), "several pieces"
    watched = [term.values for term in history._terms({0: 1.0, 1: -2.0, 2: 2.0})]
    with Reads(watched) as seen:
        history.forecast([0, 1, 2], [1.0, -2.0, 2.0], 0.5)
    assert list(seen.read.values()) == [features[0].numel()] * 3
    assert seen.made == [features[0].nbytes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_storage
def test_a_forecast_needs_one_feature_of_memory_beside_pieces_of_fixed_size(name, dtype):
    """By the allocator's own account: to widen a piece, a CPU takes one as large as the scratch and gives it back."""
    history = filled(3, random_features(3, shape=(1, 2000, 700), dtype=dtype), name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        forecast = history.forecast([0, 1, 2], [1.0, -2.0, 2.0], 0.5)
    made = [event.cpu_memory_usage for event in run.events() or () if event.cpu_memory_usage > 0]
    assert forecast.nbytes > 4 * CPU_SCRATCH
    assert [size for size in set(made) if size > 4 * CPU_SCRATCH] == [forecast.nbytes]
