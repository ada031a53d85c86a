"""FLUX's attention with fewer passes over memory: for training on a CPU, where they cost more than the products."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxTransformer2DModel
from torch import Tensor


class NormAndTurn(torch.autograd.Function):
    """Root-mean-square norm and rotary embedding in one: queries or keys of shape (B, S, heads, D), pairs turned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turn: Tensor, eps: float) -> Tensor:
        full = x.float()
        scale = torch.linalg.vector_norm(full, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = full * scale
        ctx.save_for_backward(normed, scale, weight, turn)
        return _turned(normed * weight, turn).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        normed, scale, weight, turn = ctx.saved_tensors
        back = _turned(grad.float(), turn.conj())
        along = back * normed
        weight_grad = along.flatten(0, -2).sum(dim=0)
        inner = (along @ weight).div_(normed.shape[-1]).unsqueeze_(-1)
        back.mul_(weight).addcmul_(normed, inner, value=-1).mul_(scale)
        return back.to(grad.dtype), weight_grad, None, None


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend in two products; all of shape (B, S, heads, D)."""
    query, key, value = (x.transpose(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    scores = query @ key.transpose(-1, -2)
    return (scores.softmax(-1, dtype=scores.dtype) @ value).transpose(1, 2).flatten(2)


class QuickProcessor:
    """What `FluxAttnProcessor` computes, without masks."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert image_rotary_emb is not None and attention_mask is None
        turn = torch.complex(*(part[:, ::2].contiguous() for part in image_rotary_emb))
        if encoder_hidden_states is None:
            parts = (attn.to_q, attn.to_k, attn.to_v)
            return attend(*_heads(attn, hidden_states, parts, (attn.norm_q, attn.norm_k), turn))
        told = encoder_hidden_states.shape[1]
        image_parts, text_parts = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        image = _heads(attn, hidden_states, image_parts, (attn.norm_q, attn.norm_k), turn[told:])
        text = _heads(attn, encoder_hidden_states, text_parts, (attn.norm_added_q, attn.norm_added_k), turn[:told])
        out = attend(*(torch.cat(two, dim=1) for two in zip(text, image, strict=True)))
        text_out, image_out = out.split([told, out.shape[1] - told], dim=1)
        return attn.to_out[1](attn.to_out[0](image_out)), attn.to_add_out(text_out)


def _heads(attn: FluxAttention, x: Tensor, parts: tuple, norms: tuple, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (part(x).unflatten(-1, (-1, attn.head_dim)) for part in parts)
    query, key = (
        NormAndTurn.apply(y, norm.weight, turn, norm.eps) for y, norm in zip((query, key), norms, strict=True)
    )
    return query, key, value


def quicken(transformer: FluxTransformer2DModel) -> None:
    """Let a FluxTransformer2DModel attend so while it is trained; it is not saved."""
    transformer.set_attn_processor(QuickProcessor())
