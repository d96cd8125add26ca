"""Who is measured by the attention benchmark, each as its documentation says to use it, on tensors [B, S, H, D]."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_shapes import Shape
from benchmarks.device import device
from dsvlm.ops import GitMask, git_attention
from dsvlm.ops.git_kernel import has_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS, DENSE, EFFICIENT, TWO_CALL = "ours", "SDPA dense", "SDPA efficient", "two calls"
VARLEN, FLEX, FLEX_FLASH = "two calls, varlen", "Flex", "Flex, FLASH backend"  # FlashAttention-4 with its mask_mod
CAUSAL, MAGI, FLASH = "cuDNN causal", "MagiAttention", "flash-attn 2, two calls"


class Unavailable(Exception):
    """Why a competitor cannot run this shape here."""


@dataclass(frozen=True)
class Peer:
    """build: (shape, segment ids, is_image) -> what it calls a mask; attend: (shape, mask) -> the function to time.

    exact: computes the GIT mask, so that its result is compared; extra: runs on every shape, not only the main ones.
    """

    name: str
    build: Callable[[Shape, Tensor, Tensor], Any]
    attend: Callable[[Shape, Any], Attend]
    exact: bool = True
    extra: bool = False


def git_mask(shape: Shape, ids: Tensor, image: Tensor) -> GitMask:
    return GitMask.from_segments(ids, image, packed=shape.packed)


def dense_mask(shape: Shape, ids: Tensor, image: Tensor) -> Tensor:
    allowed = GitMask.from_segments(ids, image).dense()
    return allowed | ~allowed.any(dim=-1, keepdim=True)  # a row of padding that sees nothing is NaN to some backends


def ours(shape: Shape, mask: GitMask) -> Attend:
    if not has_kernel(device().type):
        raise Unavailable(f"the library is not built, or has no code for {device().type}")
    return lambda q, k, v: git_attention(q, k, v, mask, backend="kernel")


def sdpa(q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.shape[1] != k.shape[1]:
        more["enable_gqa"] = True
    return F.scaled_dot_product_attention(q, k, v, **more).transpose(1, 2)


def sdpa_dense(shape: Shape, mask: Tensor) -> Attend:
    return lambda q, k, v: sdpa(q, k, v, attn_mask=mask)


def sdpa_efficient(shape: Shape, mask: Tensor) -> Attend:
    if not torch.cuda.is_available():
        raise Unavailable("needs CUDA")
    group = shape.heads // shape.kv_heads  # it has no grouped heads: they are repeated, as Hugging Face does

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:
            k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return sdpa(q, k, v, attn_mask=mask)

    return attend


def cudnn_causal(shape: Shape, mask: None) -> Attend:
    if not torch.cuda.is_available():
        raise Unavailable("needs CUDA")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v, is_causal=True)

    return attend


def no_mask(shape: Shape, ids: Tensor, image: Tensor) -> None:
    return None


def two_call(shape: Shape, mask: None) -> Attend:
    """Image rows among themselves; text rows against everything, causal from the lower right corner."""
    from torch.nn.attention.bias import causal_lower_right

    if shape.uniform is None:
        raise Unavailable("rows differ, or hold several samples")
    images, text = shape.uniform
    corner = causal_lower_right(text, images + text)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = sdpa(q[:, :images], k[:, :images], v[:, :images])
        return torch.cat((seen, sdpa(q[:, images:], k, v, attn_mask=corner)), dim=1)

    return attend


class Take(torch.autograd.Function):
    """Rows of x [N, ...] at `index`, each at most once: so the way back is a plain copy, not a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_copy_(0, index, grad), None


class Place(torch.autograd.Function):
    """[count, ...] from the rows of two parts; rows that neither has are 0."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, index_a: Tensor, index_b: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(index_a, index_b)
        new = a.new_empty if len(a) + len(b) == count else a.new_zeros
        return new(count, *a.shape[1:]).index_copy_(0, index_a, a).index_copy_(0, index_b, b)

    @staticmethod
    def backward(ctx, grad: Tensor):
        index_a, index_b = ctx.saved_tensors
        return grad.index_select(0, index_a), grad.index_select(0, index_b), None, None, None


def varlen_plan(shape: Shape, ids: Tensor, image: Tensor) -> dict[str, Any]:
    """Where image, text and all tokens lie in the flattened batch; ends and the longest of each sample's."""
    flat_ids, flat_image = ids.flatten(), image.flatten()
    samples = [sample for row in shape.segments for sample in row]
    lengths = {"image": [m for m, _ in samples], "text": [t for _, t in samples], "all": [m + t for m, t in samples]}
    chosen = {"image": flat_image, "text": (flat_ids >= 0) & ~flat_image, "all": flat_ids >= 0}
    return {
        name: (
            chosen[name].nonzero().flatten(),
            torch.tensor([0, *lengths[name]]).cumsum(0).to(device=ids.device, dtype=torch.int32),
            max(lengths[name]),
        )
        for name in chosen
    }


def two_call_varlen(shape: Shape, plan: dict[str, Any], varlen_attn: Callable | None = None) -> Attend:
    if varlen_attn is None:
        if not torch.cuda.is_available():
            raise Unavailable("needs CUDA")
        from torch.nn.attention.varlen import varlen_attn
    # newer versions want to be told of grouped heads; older ones just compute them
    asked = "enable_gqa" in inspect.signature(varlen_attn).parameters and shape.heads != shape.kv_heads
    grouped = {"enable_gqa": True} if asked else {}
    (images, image_ends, image_max), (text, text_ends, text_max), (every, all_ends, all_max) = (
        plan[name] for name in ("image", "text", "all")
    )
    count = shape.batch * shape.length

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        seen = varlen_attn(
            *(Take.apply(x, images) for x in (flat_q, flat_k, flat_v)),
            image_ends, image_ends, image_max, image_max, **grouped,
        )  # fmt: skip
        # without padding, keys and values lie as they are wanted
        keys, values = (x if len(every) == count else Take.apply(x, every) for x in (flat_k, flat_v))
        said = varlen_attn(
            Take.apply(flat_q, text), keys, values, text_ends, all_ends, text_max, all_max,
            window_size=(-1, 0), **grouped,
        )  # fmt: skip
        return Place.apply(seen, said, images, text, count).unflatten(0, q.shape[:2])

    return attend


def flash_two_call(shape: Shape, plan: dict[str, Any], package: Any = None) -> Attend:
    """The flash-attn package: rows that are alike in two plain calls, others in two of variable length."""
    if package is None:
        if not installed("flash_attn.flash_attn_interface"):  # FlashAttention-4 brings a flash_attn without it
            raise Unavailable("not installed")
        import flash_attn as package

    def varlen(q, k, v, ends_q, ends_k, max_q, max_k, window_size=(-1, -1)) -> Tensor:
        causal = window_size == (-1, 0)  # from the lower right corner, since 2.1
        return package.flash_attn_varlen_func(q, k, v, ends_q, ends_k, max_q, max_k, causal=causal)

    if shape.uniform is None:
        return two_call_varlen(shape, plan, varlen)
    images, attend = shape.uniform[0], package.flash_attn_func

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = attend(q[:, :images], k[:, :images], v[:, :images])
        return torch.cat((seen, attend(q[:, images:], k, v, causal=True)), dim=1)

    return twice


def block_mask(shape: Shape, ids: Tensor, image: Tensor) -> Any:
    if not torch.cuda.is_available():
        raise Unavailable("needs CUDA: no backward on the CPU")
    from torch.nn.attention.flex_attention import create_block_mask

    first, last = (x.contiguous() for x in GitMask.from_segments(ids, image).rows.unbind(-1))

    def allowed(b, h, q, k):
        return (k >= first[b, q]) & (k < last[b, q])

    return create_block_mask(allowed, shape.batch, None, shape.length, shape.length, device=ids.device)


def flex(shape: Shape, mask: Any, backend: str | None = None) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    if backend == "FLASH" and not installed("flash_attn.cute"):
        raise Unavailable("FlashAttention-4 is not installed")
    compiled = torch.compile(flex_attention, dynamic=False)
    more: dict[str, Any] = {"kernel_options": {"BACKEND": backend}} if backend else {}
    more["enable_gqa"] = shape.heads != shape.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, **more).transpose(1, 2)

    return attend


def slices(shape: Shape, ids: Tensor, image: Tensor) -> dict[str, Any]:
    """Each sample as two: image rows see the image in full, text rows all, causal from the lower right corner."""
    queries, keys, kinds, start = [], [], [], 0
    for row in range(shape.batch):
        begin = start + (shape.length - sum(map(sum, shape.segments[row])) if shape.padding == "left" else 0)
        for m, t in shape.segments[row]:
            for part, kind in (((begin, begin + m), 0), ((begin + m, begin + m + t), 1)):
                queries.append(part)
                keys.append((begin, part[1]))
                kinds.append(kind)
            begin += m + t
        start += shape.length
    size = max(b - a for a, b in queries)
    queries, keys, kinds = (torch.tensor(x, dtype=torch.int32, device=ids.device) for x in (queries, keys, kinds))
    return {"q_ranges": queries, "k_ranges": keys, "attn_type_map": kinds, "size": size}


def magi(shape: Shape, plan: dict[str, Any]) -> Attend:
    if not installed("magi_attention"):
        raise Unavailable("not installed")
    from magi_attention.api import flex_flash_attn_func

    plan = dict(plan)
    size = plan.pop("size")
    known = inspect.signature(flex_flash_attn_func).parameters
    if "max_seqlen_k" in known:  # older versions want both
        plan |= {"max_seqlen_q": size, "max_seqlen_k": shape.length}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return flex_flash_attn_func(*flat, **plan)[0].unflatten(0, q.shape[:2])

    return attend


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


PEERS = (
    Peer(OURS, git_mask, ours, extra=True),
    Peer(DENSE, dense_mask, sdpa_dense, extra=True),
    Peer(EFFICIENT, dense_mask, sdpa_efficient),
    Peer(TWO_CALL, no_mask, two_call, extra=True),
    Peer(VARLEN, varlen_plan, two_call_varlen, extra=True),
    Peer(FLEX, block_mask, flex),
    Peer(FLEX_FLASH, block_mask, functools.partial(flex, backend="FLASH")),
    Peer(FLASH, varlen_plan, flash_two_call),
    Peer(MAGI, slices, magi),
    Peer(CAUSAL, no_mask, cudnn_causal, exact=False),
)
