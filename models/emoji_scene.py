"""Train `emoji-scene`: a FluxPipeline that draws two or three emoji in a scene (see models/emoji-scene/README.md).

    python models/scene_atlas.py models/emoji-flux models/emoji-scene
    python models/emoji_scene.py vae models/emoji-scene
    python models/emoji_scene.py scene models/emoji-scene
    python models/emoji_scene.py export models/emoji-scene
    python models/emoji_scene.py evaluate models/emoji-scene

The trainings write checkpoints to .runs/emoji-scene every four minutes and resume from them. Their minutes are those of
one core, whatever else runs beside them.
"""

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from emoji_flux import Flux
from emoji_training import main, packed_latents
from quick_flux import quicken
from scene_words import NOTHING, around, classes, labels, learn_to_read, share_read
from scenes import PIXELS, Atlas, parse
from torch import nn

CUT = 64  # pixels along each side of what the autoencoder learns from
EMOJI_FLUX = Path(__file__).parent / "emoji-flux"
LOUD = 3.0  # root mean square of the embedded noise
ASIDE = 0.1  # weight of what is told beside the velocity
SHIFTED = dict(  # the times of FLUX.1-dev's scheduler: fewer of them where all is noise than emoji-flux has
    use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
)
DRAWINGS = 2  # of each caption: what captions leave to chance differs between them


class Scene(Flux):
    name = "scene"
    text_encoders = ("text_encoder", "text_encoder_2", "heads")
    dropped = 0.1
    batch = 16
    haste = 1.5
    decay = 0.99
    shift = 2.5
    vae_batch = 24
    text_tokens = 20
    image_tokens = 256
    known: Path | None = EMOJI_FLUX  # the model that the training starts from
    reading_steps = 600  # of the text encoder's training, which comes first
    clock = staticmethod(time.process_time)

    def pictures(self, folder, captions):
        atlas = Atlas(folder)
        drawn = np.stack([atlas.draw(parse(c), random.Random(k)) for k, c in enumerate(captions)])
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()

    def cut(self, drawn, progress, generator):
        y, x = torch.randint(PIXELS - CUT + 1, (2,), generator=generator).tolist()
        return drawn[..., y : y + CUT, x : x + CUT]

    def build_vae(self):
        """Start from the autoencoder of emoji-flux, without its attention over the whole picture."""
        known = AutoencoderKL.from_pretrained(EMOJI_FLUX / "vae")
        config = {**known.config, "mid_block_add_attention": False, "sample_size": PIXELS}
        vae = AutoencoderKL.from_config(config)
        vae.load_state_dict({key: known.state_dict()[key] for key in vae.state_dict()})
        return vae

    def vae_optimisers(self, vae):
        return [torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)]

    def build_pipeline(self, folder):
        pipe = super().build_pipeline(folder)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**SHIFTED)
        pipe.heads = nn.ModuleList([nn.Linear(self.width, len(kind)) for kind in classes(Atlas(folder).names)[1:]])
        if self.known:
            take_over(pipe, FluxPipeline.from_pretrained(self.known))
        hand_on(pipe.transformer)
        pipe.text_encoder_2.requires_grad_(False)  # it has learned to read before: see `prepare`
        quicken(pipe.transformer)
        return pipe

    def aside(self, pipe, folder, captions):
        """Let heads on the tokens between double and single blocks tell which thing stands about there."""
        names, seen, device = Atlas(folder).names, [], pipe.transformer.device
        pipe.heads.to(device)
        about = torch.stack([around(caption, names) for caption in captions])
        pipe.transformer.transformer_blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out[1]))

        def told(chosen: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
            tokens = seen.pop()
            right = about[chosen].long().masked_fill(dropped[:, None, None], NOTHING).to(device).unbind(-1)
            losses = [
                F.cross_entropy(
                    head(tokens).float().flatten(0, 1), one.flatten(), ignore_index=NOTHING, reduction="sum"
                )
                for head, one in zip(pipe.heads, right, strict=True)
            ]
            return ASIDE * sum(losses) / (right[0] != NOTHING).sum().clamp(min=1)

        return told

    def prepare(self, pipe, folder, captions):
        """Teach the text encoder what belongs together and where it is, before the transformer learns to draw it."""
        names = Atlas(folder).names
        tokens = self.tokens(pipe, captions)[1]
        told = torch.stack([labels(caption, names, self.text_tokens) for caption in captions])
        encoder = pipe.text_encoder_2.requires_grad_(True)
        heads = learn_to_read(encoder, tokens, told, [len(kind) for kind in classes(names)], self.reading_steps)
        encoder.requires_grad_(False)
        print(f"of the words {share_read(encoder, heads, tokens[:400], told[:400]):.3f} are read", flush=True)

    def latents(self, pipe, folder, captions):
        """Draw each caption `DRAWINGS` times, when it is first asked for; chance chooses among them."""
        atlas = Atlas(folder)
        scenes = [parse(caption) for caption in captions]
        kept: dict[int, torch.Tensor] = {}

        def draw(missing: list[int]) -> None:
            pictures = np.stack([atlas.draw(scenes[k // DRAWINGS], random.Random(k)) for k in missing])
            with torch.autocast(pipe.vae.device.type, torch.bfloat16):
                found = packed_latents(self, pipe, torch.from_numpy(pictures).movedim(-1, 1))
            kept.update(zip(missing, found.bfloat16(), strict=True))

        def drawn(chosen: torch.Tensor) -> torch.Tensor:
            chance = random.Random(str(chosen.tolist()))
            drawings = [k * DRAWINGS + chance.randrange(DRAWINGS) for k in chosen.tolist()]
            if missing := sorted(set(drawings) - kept.keys()):
                draw(missing)
            return torch.stack([kept[k] for k in drawings]).float()

        return drawn


@torch.no_grad()
def take_over(pipe: Any, known: Any) -> None:
    """Fill in a trained pipeline's transformer and text encoders; words that are new to it begin at random."""
    pipe.transformer.load_state_dict(known.transformer.float().state_dict())
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        words, known_words = (getattr(p, tokenizer).get_vocab() for p in (pipe, known))
        learned = getattr(known, encoder).float().state_dict()
        for key, weight in getattr(pipe, encoder).state_dict().items():
            if weight.shape == learned[key].shape:
                weight.copy_(learned[key])
            elif "position" in key:  # later ones are as the last
                places = torch.arange(len(weight)).clamp(max=len(learned[key]) - 1)
                weight.copy_(learned[key][places])
            else:
                weight.normal_(std=learned[key].std().item())
                for word in words.keys() & known_words.keys():
                    weight[words[word]] = learned[key][known_words[word]]


@torch.no_grad()
def hand_on(transformer: nn.Module) -> None:
    """Let the transformer return what it is given beside what its blocks add, as large models do where all is noise.

    The embedding keeps its directions and becomes so loud that the blocks add little where a run begins, and more as
    the picture comes; the last projection undoes it.
    """
    enter, leave = transformer.x_embedder, transformer.proj_out
    loudness = enter.weight.square().sum(dim=1).mean().sqrt()
    enter.weight.mul_(LOUD / loudness)
    enter.bias.mul_(LOUD / loudness)
    leave.weight.copy_(torch.linalg.pinv(enter.weight) * LOUD)


if __name__ == "__main__":
    main(Scene(), __doc__)
