"""`git_attention` inside Hugging Face models, through the attention interface (`attn_implementation="dsvlm_git"`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from dsvlm.ops import GitMask, git_attention

NAME = "dsvlm_git"


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
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention in the layout of the interface.

    query: [B, H, S, D]; key, value: [B, Hk, kv_len, D]; attention_mask: [B or 1, 1, S, 2] int32 key intervals, or None
    for full attention (encoders, and one decoded token that may see the whole cache); returns [B, S, H, D].
    """
    batch, _, queries, _ = query.shape
    kv_len = key.shape[2]
    if attention_mask is None:
        if queries > 1 and getattr(module, "is_causal", True):
            raise ValueError(
                f"{NAME}: {type(module).__name__} passed no mask for {queries} queries; the model does not hand its "
                "mask to the attention interface, so it would silently see the future"
            )
        rows = torch.tensor([0, kv_len], dtype=torch.int32, device=query.device).expand(batch, queries, 2)
    elif attention_mask.dtype == torch.int32 and attention_mask.shape[-1] == 2:
        rows = attention_mask[:, 0].expand(batch, queries, 2)
    else:
        raise ValueError(
            f"{NAME}: expected key intervals, int32 [B, 1, {queries}, 2] (GitMask.as_hf()), found "
            f"{attention_mask.dtype} {tuple(attention_mask.shape)}"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return git_attention(q, k, v, GitMask(rows, kv_len), scale=scaling, dropout=dropout).contiguous(), None


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
    """Causal key intervals [B, 1, q_length, 2] int32 for a model called without a `GitMask` (plain text, generate).

    attention_mask: [B, kv_length] bool, True = real token, or None; the real tokens of a row must be contiguous.
    """
    if mask_function is not causal_mask_function or kv_offset:
        raise ValueError(f"{NAME}: only plain causal masks can be built here; pass attention_mask=GitMask.as_hf()")
    last = torch.arange(q_length, device=device) + q_offset + 1
    if attention_mask is None:
        rows = torch.stack((torch.zeros_like(last), last), dim=-1).expand(batch_size, -1, -1)
        return rows[:, None].to(torch.int32)
    real = attention_mask[:, :kv_length]
    first = real.long().argmax(dim=1, keepdim=True)
    end = first + real.sum(dim=1, keepdim=True)
    position = torch.arange(real.shape[1], device=device)
    if not torch.equal(real, (position >= first) & (position < end)):
        raise ValueError(f"{NAME}: padding between real tokens is no interval of keys; pad on one side only")
    inside = (last > first) & (last <= end)
    rows = torch.stack((first.expand(-1, q_length), last.expand(batch_size, -1)), dim=-1)
    return rows.masked_fill(~inside[..., None], 0)[:, None].to(torch.int32)
