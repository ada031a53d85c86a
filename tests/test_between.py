"""Outputs at other times: of the size that they have there, as far as recorded ones and embeddings say it."""

import torch
from test_basis import grid

from lesa.host.embedding import embedding_of
from lesa.rows.between import between, linear

KNOWN, TIMES = grid(50)[:-1], grid(28)[:-1]
BOTH = torch.cat([KNOWN, TIMES])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(rough: torch.Tensor) -> torch.Tensor:
    """Outputs at the known times and the others, (78, 20000): a line in t, and so much of what is rough, (78, n)."""
    return torch.stack([torch.ones_like(BOTH), BOTH], 1) @ random(2, 20000, seed=1) + rough @ random(
        rough.shape[1], 20000, seed=2
    )


def off(vectors: torch.Tensor, embedded: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inner products at the other times as recorded ones say them, and as they are."""
    gram = vectors @ vectors.T / vectors.shape[1]
    ways, rest = between(gram[:50, :50], KNOWN, TIMES, embedded)
    return ways @ gram[:50, :50] @ ways.T + rest, gram[50:, 50:]


def second_differences(gram: torch.Tensor) -> torch.Tensor:
    """Return the mean squares of what is not linear from step to step, which the rough part makes."""
    ways = torch.zeros(26, 28, dtype=torch.float64)
    for k in range(26):
        share = (TIMES[k] - TIMES[k + 1]) / (TIMES[k] - TIMES[k + 2])
        ways[k, k : k + 3] = torch.stack([share - 1, torch.ones_like(share), -share])
    return (ways @ gram * ways).sum(1)


def test_the_rough_part_has_its_size_at_other_times():
    said, real = map(second_differences, off(outputs(0.01 * torch.eye(78, dtype=torch.float64))))
    assert abs(float((said / real).log().mean())) < 0.15 and float((said / real).log().abs().max()) < 1.0


def test_without_a_rough_part_nothing_is_added():
    vectors = outputs(torch.zeros(78, 1, dtype=torch.float64))
    torch.testing.assert_close(*off(vectors), rtol=1e-9, atol=1e-12)


def test_a_rough_part_that_goes_with_embeddings_is_known():
    embedded = random(78, 6)
    vectors = outputs(0.03 * embedded)
    errors = [(said - real).abs().max() for said, real in (off(vectors, embedded), off(vectors))]
    assert float(errors[0]) < 0.1 * float(errors[1])


def test_embeddings_that_say_nothing_are_left_out():
    vectors, same = outputs(0.01 * torch.eye(78, dtype=torch.float64)), torch.ones(78, 3, dtype=torch.float64)
    torch.testing.assert_close(off(vectors, same)[0], off(vectors)[0], rtol=0, atol=0)


def test_values_are_linear_between_times_and_constant_beyond():
    known, values = torch.tensor([0.8, 0.4, 0.2]).double(), torch.tensor([1.0, 3.0, 2.0]).double()
    found = linear(torch.tensor([1.0, 0.6, 0.3, 0.1]).double(), known, values)
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 2.5, 2.0]).double())


# --- what a denoiser makes of times


def test_embeddings_are_those_that_a_run_makes(tiny_flux):
    """Of each step, and of none of the blocks."""
    made, blocks = [], []
    denoiser = tiny_flux.transformer
    embedder, block = denoiser.time_text_embed.timestep_embedder, denoiser.transformer_blocks[0]
    hooks = [
        embedder.register_forward_hook(lambda _module, _given, out: made.append(out[0])),
        block.register_forward_hook(lambda *_: blocks.append(1)),
    ]
    tiny_flux("a fish", num_inference_steps=4, height=32, width=32, output_type="latent")
    ran, times = len(blocks), tiny_flux.scheduler.sigmas.double()
    embed = embedding_of([denoiser], tiny_flux.scheduler, times.tolist())
    assert embed is not None
    found = embed(times[:-1])
    for hook in hooks:
        hook.remove()
    wanted = torch.nn.functional.silu(torch.stack(made[:4]).double())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(blocks) == ran > 0


def test_of_denoisers_that_are_told_other_numbers_nothing_is_known(tiny_flux):
    tiny_flux("a fish", num_inference_steps=4, height=32, width=32, output_type="latent")
    times = tiny_flux.scheduler.sigmas.tolist()
    assert embedding_of([torch.nn.Linear(2, 2)], tiny_flux.scheduler, times) is None
    assert embedding_of([tiny_flux.transformer], tiny_flux.scheduler, [t / 2 for t in times]) is None
    assert embedding_of([tiny_flux.transformer], tiny_flux.scheduler, times[:-1]) is None
