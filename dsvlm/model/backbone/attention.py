"""`git_attention` inside Hugging Face models, through the attention interface (`attn_implementation="dsvlm_git"`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dsvlm.ops import GitMask, git_attention
from dsvlm.ops.git_backends import math, sdpa

NAME = "dsvlm_git"
UNKNOWN = ("softcap", "s_aux", "position_bias")  # of Gemma 2, GPT-OSS, T5: without them the model would be another


def register() -> None:
    """Make `attn_implementation="dsvlm_git"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, causal_rows)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    alibi_slopes: Tensor | None = None,
    git_packed: bool = True,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention in the layout of the interface.

    query: [B, H, S, D]; key, value: [B, Hk, kv_len, D]; attention_mask: [B or 1, 1, S, 2] int32 key intervals
    (`GitMask.as_hf`), or a dense mask [B or 1, 1, S, kv_len], bool (True = may attend) or floats added to the scores,
    or None for full attention (encoders, and one decoded token that may see the whole cache); returns [B, S, H, D].
    git_packed: `GitMask.packed`, which a model may hand down as a keyword of its forward.
    What changes scores and is not known here (soft caps, sinks, position biases) is a ValueError.
    """
    if unknown := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        raise ValueError(
            f"{NAME}: {type(module).__name__} passed {', '.join(unknown)}, which git_attention does not have; use "
            "attn_implementation='eager'"
        )
    device = query.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and query.dtype != torch.float64:
        # as torch's own attention does: LLaMA's rotations leave queries and keys in fp32, values in bf16
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    queries, kv_len = query.shape[2], key.shape[2]
    if attention_mask is None:
        if queries > 1 and getattr(module, "is_causal", True):
            raise ValueError(
                f"{NAME}: {type(module).__name__} passed no mask for {queries} queries; the model does not hand its "
                "mask to the attention interface, so it would silently see the future"
            )
        rows = torch.zeros(1, queries, 2, dtype=torch.int32, device=query.device)
        rows[..., 1] = kv_len
    elif attention_mask.dtype == torch.int32 and attention_mask.shape[-2:] == (queries, 2):
        rows = attention_mask[:, 0]
    elif attention_mask.shape[-2:] == (queries, kv_len) and _is_dense(attention_mask.dtype):
        return dense(query, key, value, attention_mask, dropout, scaling, alibi_slopes), None
    else:
        raise ValueError(
            f"{NAME}: expected key intervals, int32 [B, 1, {queries}, 2] (GitMask.as_hf()), or a dense mask, bool or "
            f"float [B, 1, {queries}, {kv_len}]; found {attention_mask.dtype} {tuple(attention_mask.shape)}"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = GitMask(rows, kv_len, packed=git_packed)
    out = git_attention(q, k, v, mask, scale=scaling, alibi_slopes=alibi_slopes, dropout=dropout)
    return out.contiguous(), None


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float,
    scaling: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Attention under a dense mask, as in `attention`; with a bool one, queries that may attend to nothing give 0."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    live = mask.any(dim=-1) if mask.dtype == torch.bool else torch.ones_like(mask[..., 0], dtype=torch.bool)
    if mask.dtype == torch.bool:
        safe = mask | ~live[..., None]
    else:  # the least number of a wider type would become -inf, and a row of nothing else NaN
        safe = mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
    if dropout > 0.0 or alibi_slopes is not None:
        out = math(query, key, value, safe, scaling, alibi_slopes, dropout)
    else:
        out = sdpa(query, key, value, safe, scaling)
    return torch.where(live[..., None], out, 0).transpose(1, 2).contiguous()


def causal_rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor:
    """The mask of a model that is called without a `GitMask` (plain text, generate), for `attention`.

    attention_mask: [B, kv_length] bool, True = real token, or None. Causal key intervals [B or 1, 1, q_length, 2] int32
    where they say it all; else (windows, blocks of images, padding among cached keys) a dense mask
    [B, 1, q_length, kv_length] bool.
    """
    causal = mask_function is causal_mask_function and not kv_offset
    if causal and attention_mask is None:
        last = torch.arange(q_length, device=device) + q_offset + 1
        return torch.stack((torch.zeros_like(last), last), dim=-1)[None, None].to(torch.int32)
    if causal and q_length == kv_length:
        real = attention_mask[:, :kv_length]
        return GitMask.from_block_ids(torch.full_like(real, -1, dtype=torch.int64), real).as_hf()
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        allow_is_causal_skip=False, use_vmap=kwargs.get("use_vmap", False), device=device,
    )  # fmt: skip


def _is_dense(dtype: torch.dtype) -> bool:
    return dtype == torch.bool or dtype.is_floating_point
