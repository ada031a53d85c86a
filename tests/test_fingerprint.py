"""Denoisers' weights are told by what acts when they run, wherever and in whatever form it is kept."""

import copy

import pytest
import torch
from peft import LoraConfig
from test_offload import WAYS
from tiny import build_transformer
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from lesa.host.offload import groups_layers
from lesa.predictors import fingerprint as fingerprints
from lesa.predictors.fingerprint import fingerprint, stamp


def digest(module: nn.Module) -> str:
    return fingerprint({"transformer": module})


class Plain(nn.Module):
    """Weights that are the same everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1000.0).reshape(10, 100))
        self.register_buffer("kept", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("derived", torch.zeros(3), persistent=False)


def test_it_is_the_same_in_every_process():
    assert digest(Plain()) == "722394eb0c2ef2038dac0b1904116c35438e828554274714831eed1fcd76e899"


def test_it_is_of_the_denoisers_alone_and_of_their_names(tiny_flux):
    found = digest(tiny_flux.transformer)
    assert found == digest(copy.deepcopy(tiny_flux.transformer)) == digest(build_transformer())
    assert found != digest(build_transformer(1)) and found != fingerprint({"unet": tiny_flux.transformer})
    one, other = build_transformer(), build_transformer(1)
    assert fingerprint({"a": one, "b": other}) == fingerprint({"b": other, "a": one})
    assert fingerprint({"a": one, "b": other}) != fingerprint({"a": other, "b": one})


@pytest.mark.parametrize("place", [0, 501, 999])
def test_a_change_anywhere_in_a_tensor_is_seen_if_it_is_as_wide_as_a_stride(place):
    changed = Plain()
    changed.weight.data.view(-1)[max(place - 16, 0) : place + 16] += 1
    assert digest(changed) != digest(Plain())


def test_what_is_derived_does_not_count_and_the_form_of_storage_does():
    changed = Plain()
    changed.derived += 1
    assert digest(changed) == digest(Plain())
    assert digest(Plain().half()) != digest(Plain())


def test_few_elements_are_read():
    assert [len(fingerprints._places(count)) for count in (1, 64, 65, 10**9)] == [1, 64, 64, 64]
    assert fingerprints._places(10**9)[-1] == 10**9 - 1
    huge = torch.zeros(1).expand(10**12)  # that nobody could copy
    transposed = torch.arange(6.0).reshape(2, 3).T
    assert len(fingerprints._sample(huge)) == 64 * 4
    assert fingerprints._sample(transposed) == fingerprints._sample(transposed.contiguous())


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights_are_found(way, tiny_flux):
    pipe = copy.deepcopy(tiny_flux)
    WAYS[way](pipe)
    assert digest(pipe.transformer) == digest(tiny_flux.transformer)
    changed = copy.deepcopy(tiny_flux)
    changed.transformer.x_embedder.weight.data.add_(1.0)
    WAYS[way](changed)
    assert digest(changed.transformer) != digest(tiny_flux.transformer)


@pytest.mark.skipif(not groups_layers(), reason="an older diffusers groups layers for an accelerator alone")
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_weights_offloaded_to_disk_are_read_there(kind, tmp_path):
    whole, moved = build_transformer(), build_transformer()
    blocks = dict(num_blocks_per_group=1) if kind == "block_level" else {}
    moved.enable_group_offload(
        torch.device("cpu"), offload_type=kind, offload_to_disk_path=str(tmp_path), use_stream=False, **blocks
    )
    for x in moved.parameters():
        if id(x) in fingerprints._on_disk(moved):
            x.data.fill_(7.0)  # it is whatever the memory holds
    assert any(tmp_path.iterdir())
    assert digest(moved) == digest(whole)


def test_a_compiled_module_is_what_it_was_compiled_from():
    module = build_transformer()
    assert digest(torch.compile(module)) == digest(module)
    parts = build_transformer()
    parts.transformer_blocks[0] = torch.compile(parts.transformer_blocks[0])
    assert digest(parts) == digest(module)
    module.compile_repeated_blocks()
    assert digest(module) == digest(parts)


def with_adapter(name: str, seed: int = 0) -> nn.Module:
    module = build_transformer()
    adapt(module, name, seed)
    return module


def adapt(module, name, seed=0):
    module.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for where, x in module.named_parameters():
        if f".{name}." in where:
            x.data.copy_(torch.randn(x.shape, generator=generator))


def test_a_lora_counts_with_its_scale_while_it_acts_whatever_it_is_called():
    plain, module = build_transformer(), with_adapter("one")
    adapted = digest(module)
    assert adapted != digest(plain) and adapted == digest(with_adapter("other"))
    assert adapted != digest(with_adapter("one", seed=1))
    module.set_adapters(["one"], [0.5])
    assert digest(module) not in (adapted, digest(plain))
    module.set_adapters(["one"], [0.0])
    assert digest(module) == digest(plain)
    module.set_adapters(["one"], [1.0])
    assert digest(module) == adapted
    module.disable_adapters()
    assert digest(module) == digest(plain)
    module.enable_adapters()
    adapt(module, "two", seed=1)
    both = {name: (module.set_adapters(names), digest(module))[1] for name, names in NAMES.items()}
    assert both["first"] == adapted and both["second"] == digest(with_adapter("x", seed=1))
    assert len(set(both.values())) == 3
    module.set_adapters(["one"])
    module.fuse_lora()
    assert digest(module) not in (adapted, digest(plain))


NAMES = {"first": ["one"], "second": ["two"], "both": ["one", "two"]}


def test_quantised_tensors_are_told_by_what_they_are_made_of():
    def quantised(scale: float) -> nn.Module:
        module = Plain()
        module.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.full((4, 4), scale)), requires_grad=False)
        return module

    assert digest(quantised(2.0)) == digest(quantised(2.0)) != digest(quantised(3.0))

    def in_four_bits(scale: float) -> nn.Module:
        module = Plain()
        module.weight.quant_state = type("QuantState", (), {"absmax": torch.tensor([scale])})()
        return module

    assert digest(in_four_bits(2.0)) == digest(in_four_bits(2.0)) != digest(in_four_bits(3.0))


def test_layers_kept_in_float8_are_told():
    cast = [build_transformer(seed) for seed in (0, 0, 1)]
    for module in cast:
        module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    digests = [digest(module) for module in cast]
    assert digests[0] == digests[1] != digests[2] and digests[0] != digest(build_transformer())


def test_a_cheap_look_tells_that_weights_were_exchanged():
    module = with_adapter("one")
    looks = [stamp({"": module})]
    assert stamp({"": module}) == looks[0]
    for change in (
        lambda: module.set_adapters(["one"], [0.5]),
        lambda: module.disable_adapters(),
        lambda: module.load_state_dict({k: x + 1 for k, x in module.state_dict().items()}),
        lambda: setattr(module, "proj_out", nn.Linear(24, 16)),
    ):
        change()
        assert stamp({"": module}) not in looks
        looks.append(stamp({"": module}))
