"""The embedded model `emoji-scene`: its captions, pictures and recogniser, how it is trained, and what it draws."""

import copy
import random
from itertools import combinations, count
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from emoji_flux import Flux
from emoji_scene import DRAWINGS, EMOJI_FLUX, Scene, hand_on, take_over
from emoji_training import export, train_transformer
from quick_flux import quicken
from scene_words import NOTHING, around, classes, labels, learn_to_read, share_read
from scenes import LATTICE, PIXELS, RELATIONS, SIZES, SKY_SIZE, Atlas, caption, pair, parse, places

import lesa
from lesa.bench.recogniser import recogniser

MODEL = Path(__file__).parents[1] / "models" / "emoji-scene"
SPLITS = {
    split: (MODEL / "prompts" / f"{split}.txt").read_text().splitlines() for split in ("train", "validation", "heldout")
}
TRAINED = (MODEL / "model_index.json").exists()
EXAMPLE = "small red bug left of large blue cow, on green, under a yellow moon"


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas(MODEL)


def drawn(atlas: Atlas, prompt: str, chance: int = 0) -> np.ndarray:
    return atlas.draw(parse(prompt), random.Random(chance))


def test_captions_are_read_back():
    together = [prompt for split in SPLITS.values() for prompt in split]
    assert len(set(together)) == len(together) and len(SPLITS["heldout"]) >= 1000
    assert all(caption(parse(prompt)) == prompt for prompt in together)
    assert {parse(prompt).relation for prompt in together} == set(RELATIONS)
    assert {parse(prompt).sky is None for prompt in together} == {True, False}


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "small red bug",
        "small red bug left of large blue cow",  # on what?
        "small red bug near large blue cow, on green",
        "tiny red bug left of large blue cow, on green",
        "small red bug left of large blue bug, on green",
        "small green bug left of large blue cow, on green",
        "small red bug above large blue cow, on green, under a yellow moon",  # there is no room for it
        "small red bug left of large blue cow, on green, under a yellow bed",
    ],
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="a prompt must read like"):
        parse(prompt)


def test_no_two_lists_name_the_same_pair(atlas):
    pairs = {split: {pair(parse(prompt)) for prompt in prompts} for split, prompts in SPLITS.items()}
    assert all(not one & other for one, other in combinations(pairs.values(), 2))
    names = {name for two in pairs["train"] for name in two}
    assert names == set(atlas.names), "what is held out is met in training, one by one"


def test_things_lie_in_the_picture_and_apart_whatever_chance_has():
    for prompt in [EXAMPLE, *SPLITS["validation"]]:
        boxes = []
        for thing, (xs, ys) in places(parse(prompt)):
            side = SIZES.get(thing.size, SKY_SIZE)
            boxes.append((xs[0], xs[-1] + side, ys[0], ys[-1] + side))
        assert all(0 <= low < high <= PIXELS for x0, x1, y0, y1 in boxes for low, high in ((x0, x1), (y0, y1)))
        for a, b in combinations(boxes, 2):
            assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]


def test_places_are_those_of_the_relation():
    things = "small red bug {} large blue cow, on green"
    for relation, axis, sign in (("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1), ("below", 1, 1)):
        (_, first), (_, second) = places(parse(things.format(relation)))
        assert np.sign(np.mean(first[axis]) - np.mean(second[axis])) == sign


def test_a_drawing_is_recognised_and_not_what_differs_in_one_word(atlas):
    others = [
        EXAMPLE.replace(*words)
        for words in (
            ("bug", "axe"),
            ("cow", "bed"),
            ("small", "large"),
            ("blue", "purple"),
            ("left", "right"),
            ("moon", "star"),
            ("yellow", "red"),
        )
    ]
    is_prompted = recogniser(MODEL)
    assert is_prompted is not None
    pictures = [drawn(atlas, prompt, chance) for chance, prompt in enumerate([EXAMPLE, EXAMPLE, *others])]
    assert is_prompted([EXAMPLE] * len(pictures), pictures) == [True, True, *[False] * len(others)]
    assert not any(atlas.are_found(EXAMPLE, np.full_like(pictures[0], 200)))


def test_drawings_are_recognised_through_noise(atlas):
    prompts, chance = SPLITS["heldout"][:4], np.random.default_rng(0)
    pictures = [drawn(atlas, prompt, k) for k, prompt in enumerate(prompts)]
    noisy = [(p + chance.normal(0, 18, p.shape)).clip(0, 255).astype(np.uint8) for p in pictures]
    assert all(atlas.is_prompted(prompts, noisy))


# --- the training


class Fresh(Scene):
    """A recipe that starts from nothing."""

    known = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder as its transformer's training begins, with emoji-flux's autoencoder."""
    folder = tmp_path_factory.mktemp("scene")
    for name in ("prompts", "emoji.json", "emoji.png"):
        (folder / name).symlink_to(MODEL / name)
    Scene().build_vae().save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def untrained(folder):
    torch.manual_seed(0)
    return Fresh().build_pipeline(folder)


def test_every_caption_fits_and_has_a_token_a_word(untrained):
    recipe, prompts = Scene(), SPLITS["train"][:500]
    clip, t5 = recipe.tokens(untrained, prompts)
    words = torch.tensor([len(prompt.split()) for prompt in prompts])
    commas = torch.tensor([prompt.count(",") for prompt in prompts])
    assert clip.shape == t5.shape == (500, recipe.text_tokens)
    unknown = untrained.tokenizer_2.unk_token_id
    assert not (t5 == unknown).any() and ((t5 != 0).sum(1) == words + commas + 1).all()
    assert ((clip != 1).sum(1) == words + commas + 1).all(), "the end is also what fills up"


def test_it_is_of_the_size_that_was_asked_for(untrained):
    assert sum(p.numel() for p in untrained.transformer.parameters()) <= 20e6
    assert untrained.vae_scale_factor * 2 * int(Scene.image_tokens**0.5) == PIXELS


@torch.no_grad()
def test_untrained_it_hands_the_noise_on(untrained):
    recipe = Scene()
    noise, tokens = torch.randn(2, recipe.image_tokens, 16), recipe.tokens(untrained, SPLITS["train"][:2])
    velocity = recipe.velocity(untrained, noise, torch.ones(2), *tokens)
    assert (velocity - noise).square().mean() < 0.1


def test_a_caption_is_drawn_otherwise_from_time_to_time(untrained):
    latents = Scene().latents(untrained, MODEL, SPLITS["train"])
    first = latents(torch.tensor([3, 4]))
    assert first.shape == (2, Scene.image_tokens, 16)
    assert torch.equal(first, latents(torch.tensor([3, 4])))
    drawn = [latents(torch.tensor([3, other]))[0] for other in range(24)]
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == DRAWINGS
    assert any((first[0] - one).abs().max() > 0.1 for one in drawn)


@torch.no_grad()
def test_known_words_are_read_as_emoji_flux_reads_them(folder):
    known, pipe = FluxPipeline.from_pretrained(EMOJI_FLUX), Flux.build_pipeline(Scene(), folder)
    take_over(pipe, known)
    read = []
    for one in (known, pipe):
        clip, t5 = Flux().tokens(one, ["small zebra on blue, left", "large pill on green, right"])
        read.append((one.text_encoder(clip).pooler_output, one.text_encoder_2(t5)[0]))
    for ours, theirs in zip(*read, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for name, weight in known.transformer.state_dict().items():
        assert torch.equal(weight, pipe.transformer.state_dict()[name])


def test_every_word_of_a_thing_is_labelled_with_it(untrained, atlas):
    kinds = classes(atlas.names)
    for prompt in [EXAMPLE, *SPLITS["validation"][:50]]:
        (ids,) = Scene().tokens(untrained, [prompt])[1].tolist()
        words = [word.strip("▁") for word in untrained.tokenizer_2.convert_ids_to_tokens(ids)]
        about = labels(prompt, atlas.names, len(words)).tolist()
        told = {tuple(kind[k] for kind, k in zip(kinds, one, strict=True)) for one in about if one[0] != NOTHING}
        assert {one[1:] for one in told} == {tuple(thing) for thing, _ in places(parse(prompt))}
        for word, one in zip(words, about, strict=True):
            meant = one[0] != NOTHING and word in [kind[k] for kind, k in zip(kinds, one, strict=True)]
            assert meant == (one[0] != NOTHING)


@pytest.mark.broad
def test_it_learns_to_read_captions_that_it_was_not_trained_on(untrained, atlas):
    torch.manual_seed(0)
    encoder, kinds = copy.deepcopy(untrained.text_encoder_2).requires_grad_(True), classes(atlas.names)
    (tokens, told), (new, new_told) = (
        (
            Scene().tokens(untrained, prompts)[1],
            torch.stack([labels(p, atlas.names, Scene.text_tokens) for p in prompts]),
        )
        for prompts in (SPLITS["train"][:2000], SPLITS["validation"][:200])
    )
    heads = learn_to_read(encoder, tokens, told, [len(kind) for kind in kinds], steps=80)
    assert share_read(encoder, heads, new, new_told) > 0.6


def test_what_stands_about_a_token_is_told_where_it_may_stand(atlas):
    kinds, side = classes(atlas.names)[1:], PIXELS // LATTICE
    for prompt in [EXAMPLE, *SPLITS["validation"][:50]]:
        about = around(prompt, atlas.names).reshape(side, side, 3)
        for chance in range(3):
            for thing, (xs, ys) in places(parse(prompt)):
                half = SIZES.get(thing.size, SKY_SIZE) // 2
                x, y = (random.Random(chance).choice(span) + half for span in (xs, ys))
                one = about[y // LATTICE, x // LATTICE].tolist()
                assert [kind[k] for kind, k in zip(kinds, one, strict=True)] == list(thing)
        assert (about == NOTHING).any()


class Small(Fresh):
    """A recipe whose clock stands still but for a step's start and end: each step takes a second."""

    width, batch, reading_steps = 64, 2, 2

    def __init__(self):
        ticks = count()
        self.clock = lambda: float(next(ticks))


def test_a_training_goes_on_where_it_was_and_what_it_writes_draws(tmp_path):
    folder, runs = tmp_path / "scene", tmp_path / "runs"
    (folder / "prompts").mkdir(parents=True)
    for name in ("emoji.json", "emoji.png", "call.json"):
        (folder / name).symlink_to(MODEL / name)
    for split, prompts in SPLITS.items():
        (folder / "prompts" / f"{split}.txt").write_text("\n".join(prompts[:20]))
    Scene().build_vae().save_pretrained(folder / "vae")
    for seconds in (2, 3):
        train_transformer(Small(), folder, runs, seconds / 60)
        kept = torch.load(runs / "scene.pt", weights_only=True)
        assert (kept["spent"], kept["step"]) == (seconds, seconds)
    export(Small(), folder, runs)
    pipe = lesa.load(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(SPLITS["validation"][0], num_inference_steps=2).images[0].size == (PIXELS, PIXELS)
    learned, written = kept["average"]["transformer/proj_out.weight"], pipe.transformer.proj_out.weight.float()
    torch.testing.assert_close(written, learned, atol=0.01, rtol=0.01)


def test_the_quick_attention_is_that_of_diffusers():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    hand_on(transformer)
    for name, weight in transformer.named_parameters():
        if "norm_" in name and weight.ndim == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(2.0), torch.arange(3.0), indexing="ij"), -1)
    call = dict(
        hidden_states=torch.randn(2, 6, 4),
        encoder_hidden_states=torch.randn(2, 5, 8),
        pooled_projections=torch.randn(2, 8),
        timestep=torch.rand(2),
        img_ids=ids.flatten(0, 2),
        txt_ids=torch.zeros(5, 3),
    )

    def output_and_slopes() -> list[torch.Tensor]:
        transformer.zero_grad()
        output = transformer(**call).sample
        output.square().sum().backward()
        return [output.detach(), *(p.grad.clone() for p in transformer.parameters() if p.grad is not None)]

    usual = output_and_slopes()
    quicken(transformer)
    for ours, theirs in zip(output_and_slopes(), usual, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# --- the weights


@pytest.fixture(scope="module")
def pipe():
    if not TRAINED:
        pytest.skip("emoji-scene has no weights yet (models/recipes/scene.sh makes them)")
    pipe = lesa.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small(pipe):
    assert sum(p.numel() for p in pipe.transformer.parameters()) <= 20e6
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 50e6


def test_it_draws_held_out_prompts(pipe, atlas):
    prompts = SPLITS["heldout"][:6]
    seeds = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    pictures = [np.asarray(image) for image in pipe(prompts, generator=seeds, num_inference_steps=20).images]
    found = [
        thing for prompt, picture in zip(prompts, pictures, strict=True) for thing in atlas.are_found(prompt, picture)
    ]
    assert pictures[0].shape == (PIXELS, PIXELS, 3) and np.mean(found) >= 0.7
