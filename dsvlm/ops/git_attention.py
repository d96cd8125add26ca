"""Attention under a `GitMask`: the public function and its PyTorch backends."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsvlm.ops.git_mask import GitMask

BACKENDS = ("auto", "sdpa", "math")


def git_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: GitMask,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention where each query sees its interval of keys; rows without keys give exactly 0.

    q: [B, S, H, D]; k, v: [B, kv_len, Hk, D] with H a multiple of Hk; returns [B, S, H, D].
    scale: factor on the scores, 1/sqrt(D) by default; alibi_slopes: [H], adds slope * (key - query), Press et al. 2022.
    dropout: probability, applied to the attention weights by `torch.nn.functional.dropout`.
    backend: "sdpa" (dense mask), "math" (plain formula, fp64 capable), "auto". Padding may hold any value, NaN too.
    """
    if backend not in BACKENDS:
        raise ValueError(f"git_attention: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if q.shape[2] % k.shape[2] or k.shape[1] != mask.kv_len or q.shape[1] != mask.rows.shape[1]:
        raise ValueError(
            f"git_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and a mask of {mask.rows.shape[1]} queries by "
            f"{mask.kv_len} keys do not fit; expected [B, S, H, D], [B, kv_len, Hk, D], H a multiple of Hk"
        )
    plain = alibi_slopes is None and dropout == 0.0
    if backend == "sdpa" and not plain:
        raise ValueError("git_attention: backend 'sdpa' has neither ALiBi nor dropout; use backend='math'")

    allowed = mask.dense()
    live_query = (mask.rows[..., 1] > mask.rows[..., 0])[:, :, None, None]
    live_key = allowed.any(dim=-2)[:, 0, :, None, None]
    # a masked score has weight 0, but 0 * NaN is NaN: padding is cut out of the products and of their gradients
    q, k, v = torch.where(live_query, q, 0), torch.where(live_key, k, 0), torch.where(live_key, v, 0)
    allowed = allowed | ~live_query[:, None, :, 0]  # softmax over no key is NaN; those rows are zeroed below
    if (group := q.shape[2] // k.shape[2]) > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if plain and backend != "math":
        out = _sdpa(q, k, v, allowed, scale)
    else:
        out = _math(q, k, v, allowed, scale, alibi_slopes, dropout)
    return torch.where(live_query, out.transpose(1, 2), 0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    # without cuDNN: its backward with a mask gives NaN for lengths of 64 modulo 128 on Hopper (pytorch#196678)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


def _math(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, alibi_slopes: Tensor | None, dropout: float
) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if alibi_slopes is not None:
        key = torch.arange(k.shape[2], device=q.device)
        query = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        scores = scores + alibi_slopes[:, None, None] * (key - query[:, None])
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1).to(q.dtype)
    if dropout > 0.0:
        weights = F.dropout(weights, p=dropout)
    return weights @ v
