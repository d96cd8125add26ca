"""The compiled routing ops (`torch.ops.dsvlm.moe_*`): their gradients, their shapes, and where they serve."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsvlm.ops.library import built_for, constant

OPS = ("moe_route", "moe_permute", "moe_combine")
DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def kernel_refuses(x: Tensor) -> str:
    """Why the compiled ops cannot serve a tensor, with what to do instead; empty if they can."""
    device = x.device.type
    if device not in DTYPES or not has_kernel(device):
        return f"there are no compiled ops for {device} here; build them (see README), or use backend='torch'"
    if x.dtype not in DTYPES[device]:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[device])
        return f"{x.dtype} is none of {names} on {device}; cast it, or use backend='torch'"
    return ""


@constant
def has_kernel(device: str) -> bool:
    """Whether the library is there, and was built with the ops for this type of device."""
    return built_for(device, OPS) and with_fakes()


@functools.cache
def with_fakes() -> bool:
    """Tells torch.compile what the ops return; they are there."""
    for op, forward, backward in (
        ("moe_route", fake_route, fake_route_backward),
        ("moe_permute", fake_permute, fake_permute_backward),
        ("moe_combine", fake_combine, fake_combine_backward),
    ):
        torch.library.register_fake(f"dsvlm::{op}", forward)
        torch.library.register_fake(f"dsvlm::{op}_backward", backward)
    return True


# Functions around the ops, not gradients registered with them, which take 0.1 ms longer on the host.
class Route(torch.autograd.Function):
    """`moe_route` with its gradient."""

    @staticmethod
    def forward(ctx, logits, noise, modality, valid, pool, *sizes):
        out = torch.ops.dsvlm.moe_route(logits, noise, modality, valid, pool, *sizes)
        _, index, *integers, _, _, _, _, lse, bad_rows = out
        ctx.mark_non_differentiable(index, *integers, lse, bad_rows)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, noise, modality, valid, index, lse)
        *_, renormalize, _, load_sigma = sizes
        ctx.settings = renormalize, load_sigma
        return out

    @staticmethod
    def backward(ctx, grad_weight, *grads):
        refuse_second_derivative()
        sums = grads[6:10]
        upstream = [grad if grad is None else grad.contiguous() for grad in (grad_weight, *sums)]
        return torch.ops.dsvlm.moe_route_backward(*upstream, *ctx.saved_tensors, *ctx.settings), *[None] * 13


class Permute(torch.autograd.Function):
    """`moe_permute` with its gradient."""

    @staticmethod
    def forward(ctx, x, src, slot):
        ctx.save_for_backward(src, slot)
        return torch.ops.dsvlm.moe_permute(x, src, slot)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        return torch.ops.dsvlm.moe_permute_backward(grad.contiguous(), *ctx.saved_tensors), None, None


class Combine(torch.autograd.Function):
    """`moe_combine` with its gradients."""

    @staticmethod
    def forward(ctx, y, weight, slot, src):
        ctx.save_for_backward(y, weight, slot, src)
        return torch.ops.dsvlm.moe_combine(y, weight, slot, src)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        return *torch.ops.dsvlm.moe_combine_backward(grad.contiguous(), *ctx.saved_tensors), None, None


def refuse_second_derivative() -> None:
    """For a backward: where a graph of it is asked for, an error, not a graph that the op is missing from."""
    if torch.is_grad_enabled():
        raise RuntimeError("the compiled routing ops have no second derivative; use backend='torch'")


def fake_route(
    logits, noise, modality, valid, pool, k, capacity, max_rows, align, policy, slot_order, renormalize,
    num_modalities, load_sigma,
):  # fmt: skip
    tokens, experts = logits.shape
    table = (num_modalities, experts)

    def real(*sizes):
        return logits.new_empty(sizes, dtype=torch.promote_types(logits.dtype, torch.float32))

    def integers(*sizes):
        return logits.new_empty(sizes, dtype=torch.int32)

    choices = real(tokens, k), integers(tokens, k), integers(tokens, k)
    counts = integers(experts), integers(experts, len(capacity)), integers(experts, len(capacity))
    sums = real(*table), real(num_modalities), real(num_modalities), real(*table)
    return *choices, integers(max_rows), *counts, *sums, real(tokens), integers()


def fake_route_backward(grad_weight, grad_prob, grad_ent, grad_z2, grad_loadp, logits, *rest):
    return torch.empty_like(logits)


def fake_permute(x, src, slot):
    return x.new_empty(src.shape[0], x.shape[1])


def fake_permute_backward(grad_out, src, slot):
    return grad_out.new_empty(slot.shape[0], grad_out.shape[1])


def fake_combine(y, weight, slot, src):
    return y.new_empty(slot.shape[0], y.shape[1])


def fake_combine_backward(grad_out, y, weight, slot, src):
    return torch.empty_like(y), torch.empty_like(weight)
