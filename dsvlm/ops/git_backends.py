"""The PyTorch backends of the GIT attention: on [B, H, S, D] whose padding is already 0; empty rows give anything."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from dsvlm.ops.git_mask import GitMask


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """PyTorch's attention; mask: [B or 1, 1, S, kv_len], bool (True = may attend) or floats added to the scores."""
    k, v = grouped(q, k, v)
    # without cuDNN: its backward with a mask gives NaN for lengths of 64 modulo 128 on Hopper (pytorch#196678)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def math(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, alibi_slopes: Tensor | None, dropout: float
) -> Tensor:
    """The plain formula, scores in at least fp32; mask as in `sdpa`."""
    k, v = grouped(q, k, v)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if alibi_slopes is not None:
        key = torch.arange(k.shape[2], device=q.device)
        query = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        scores = scores + alibi_slopes.to(scores.dtype)[:, None, None] * (key - query[:, None])
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1).to(q.dtype)
    if dropout > 0.0:
        weights = F.dropout(weights, p=dropout)
    return weights @ v


def two_call(q: Tensor, k: Tensor, v: Tensor, images: int, scale: float) -> Tensor:
    """Images among themselves without a mask, then text on everything, causal from the bottom right corner."""
    from torch.nn.attention.bias import causal_lower_right  # brings torch._dynamo

    group = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    parts = []
    if images > 0:
        parts.append(F.scaled_dot_product_attention(q[:, :, :images], k[:, :, :images], v[:, :, :images], **group))
    if (texts := q.shape[2] - images) > 0:
        corner = causal_lower_right(texts, k.shape[2])
        parts.append(F.scaled_dot_product_attention(q[:, :, images:], k, v, attn_mask=corner, **group))
    return torch.cat(parts, dim=2)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: GitMask, scale: float, alibi_slopes: Tensor | None) -> Tensor:
    """FlexAttention, compiled on CUDA; on the CPU not compiled and without gradients."""

    slopes = None if alibi_slopes is None else alibi_slopes.float()

    def alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + slopes[head] * (key - query)

    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "git_attention: backend 'flex' has no gradients on the CPU; use backend='auto', or torch.no_grad()"
        )
    options = {"block_mask": mask.block_mask(), "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    attend = compiled_flex() if q.device.type == "cuda" and not torch.compiler.is_compiling() else flex_attention
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
        return attend(q, k, v, score_mod=None if slopes is None else alibi, **options)


@functools.cache
def compiled_flex():
    return torch.compile(flex_attention)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with as many heads as q: each serves a group of neighbouring query heads."""
    if (group := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return k, v
