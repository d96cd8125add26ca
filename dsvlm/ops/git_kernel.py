"""The compiled GIT attention (`torch.ops.dsvlm.git_attention_*`) with its gradient, for autograd and torch.compile."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dsvlm.ops.library import built_for, constant

OPS = ("git_attention_forward", "git_attention_backward")
DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float16),
}
HEAD_SIZES = {"cuda": (64, 80, 96, 128)}  # the CPU takes any


def kernel(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float, alibi_slopes: Tensor | None) -> Tensor:
    """Attention [B, S, H, D] by the compiled op: no square of any kind, padding never read, deterministic.

    q: [B, S, H, D]; k, v: [B, kv_len, Hk, D]; rows: as in `GitMask`. What the op does not support is a ValueError.
    """
    if problem := kernel_refuses(q, k, v, alibi_slopes):
        raise ValueError(f"git_attention: backend 'kernel': {problem}")
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.float().contiguous()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if backward or any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):  # refused, or it would be 0
        return KernelAttention.apply(q, k, v, rows, alibi_slopes, scale)
    return torch.ops.dsvlm.git_attention_forward(q, k, v, rows, alibi_slopes, scale)[0]


class KernelAttention(torch.autograd.Function):
    """The op and its backward, which refuses to be part of a graph: a second derivative would miss it silently."""

    @staticmethod
    def forward(ctx, q, k, v, rows, alibi_slopes, scale):
        out, lse = torch.ops.dsvlm.git_attention_forward(q, k, v, rows, alibi_slopes, scale)
        ctx.save_for_backward(q, k, v, out, lse, rows, alibi_slopes)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("git_attention: the compiled op has no second derivative; use backend='math'")
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grads = torch.ops.dsvlm.git_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
        return *grads, None, None, None


def kernel_refuses(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None) -> str:
    """Why the compiled op cannot serve these inputs, with what to do instead; empty if it can."""
    device = q.device.type
    if device not in DTYPES or not has_kernel(device):
        return f"there is no compiled op for {device} here; build it (see README), or use backend='sdpa'"
    if q.dtype not in DTYPES[device] or k.dtype != q.dtype or v.dtype != q.dtype:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[device])
        found = f"{q.dtype}, {k.dtype}, {v.dtype}".replace("torch.", "")
        return f"q, k and v have one of {names} on {device}, found {found}; cast them, or use backend='sdpa'"
    if q.shape[3] not in HEAD_SIZES.get(device, (q.shape[3],)):
        sizes = ", ".join(map(str, HEAD_SIZES[device]))
        return f"head size {q.shape[3]} is none of {sizes} on {device}; use backend='sdpa'"
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        return "alibi_slopes have no gradient; use backend='math'"
    return ""


@constant
def has_kernel(device: str) -> bool:
    """Whether the library is there, and was built with the op for this type of device."""
    return built_for(device, OPS) and with_fakes()


@functools.cache
def with_fakes() -> bool:
    """Tells torch.compile what shapes the ops return; they are there."""
    torch.library.register_fake(f"dsvlm::{OPS[0]}", fake_forward)
    torch.library.register_fake(f"dsvlm::{OPS[1]}", fake_backward)
    return True


def fake_forward(q, k, v, rows, alibi_slopes, scale):
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


def fake_backward(grad, q, k, v, out, lse, rows, alibi_slopes, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))
