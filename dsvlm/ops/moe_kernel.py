"""The compiled routing ops (`torch.ops.dsvlm.moe_*`): their gradients, their shapes, and where they serve."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsvlm.ops.library import library

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


@torch.compiler.assume_constant_result
def has_kernel(device: str) -> bool:
    """Whether the library is there, and was built with the ops for this type of device."""
    return built_for(device)


@functools.cache
def built_for(device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    return registered() and all(torch._C._dispatch_has_kernel_for_dispatch_key(f"dsvlm::{op}", key) for op in OPS)


@functools.cache
def registered() -> bool:
    """Loads the library and tells torch what the ops return and what their gradients are; False where there is none."""
    if not library() or not hasattr(torch.ops.dsvlm, "moe_route"):  # a library from before there were these ops
        return False
    for op, fake, save, backward in (
        ("moe_route", fake_route, save_route, route_backward),
        ("moe_permute", fake_permute, save_permute, permute_backward),
        ("moe_combine", fake_combine, save_combine, combine_backward),
    ):
        torch.library.register_fake(f"dsvlm::{op}", fake)
        torch.library.register_autograd(f"dsvlm::{op}", backward, setup_context=save)
        torch.library.register_autograd(f"dsvlm::{op}_backward", no_second_derivative)
    torch.library.register_fake("dsvlm::moe_route_backward", fake_route_backward)
    torch.library.register_fake("dsvlm::moe_permute_backward", fake_permute_backward)
    torch.library.register_fake("dsvlm::moe_combine_backward", fake_combine_backward)
    return True


def no_second_derivative(ctx, *grads):
    raise RuntimeError("the compiled routing ops have no second derivative; use backend='torch'")


def save_route(ctx, inputs, output):
    logits, noise, modality, valid, *_ = inputs
    _, index, *integers, prob_sum, ent_sum, z2_sum, loadp_sum, lse, bad_rows = output
    ctx.mark_non_differentiable(index, *integers, lse, bad_rows)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, noise, modality, valid, index, lse)
    ctx.settings = inputs[11], inputs[13]  # renormalize, load_sigma


def route_backward(ctx, grad_weight, *grads):
    sums = grads[6:10]
    upstream = [grad if grad is None else grad.contiguous() for grad in (grad_weight, *sums)]
    return torch.ops.dsvlm.moe_route_backward(*upstream, *ctx.saved_tensors, *ctx.settings), *[None] * 13


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


def save_permute(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def permute_backward(ctx, grad):
    return torch.ops.dsvlm.moe_permute_backward(grad.contiguous(), *ctx.saved_tensors), None, None


def fake_permute(x, src, slot):
    return x.new_empty(src.shape[0], x.shape[1])


def fake_permute_backward(grad_out, src, slot):
    return grad_out.new_empty(slot.shape[0], grad_out.shape[1])


def save_combine(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def combine_backward(ctx, grad):
    grads = torch.ops.dsvlm.moe_combine_backward(grad.contiguous(), *ctx.saved_tensors)
    return *grads, None, None


def fake_combine(y, weight, slot, src):
    return y.new_empty(slot.shape[0], y.shape[1])


def fake_combine_backward(grad_out, y, weight, slot, src):
    return torch.empty_like(y), torch.empty_like(weight)
