"""Attention under a `GitMask`: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvlm.ops.git_backends import flex, math, sdpa, two_call
from dsvlm.ops.git_choice import choose
from dsvlm.ops.git_kernel import kernel
from dsvlm.ops.git_mask import GitMask
from dsvlm.ops.library import same_device

BACKENDS = ("auto", "kernel", "two_call", "flex", "sdpa", "math")


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
    dropout: probability, applied to the attention weights by `torch.nn.functional.dropout`; only "math" has it.
    backend: "kernel" (the compiled op), "two_call" (PyTorch's attention twice; rows of one sample whose number of image
    tokens is an int), "flex" (FlexAttention), "sdpa" (PyTorch's, dense mask), "math" (the formula), or "auto".
    Padding may hold any value, NaN too; its gradients are 0. What a backend cannot do is a ValueError.
    """
    if backend not in BACKENDS:
        raise ValueError(f"git_attention: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    check(q, k, v, mask, scale, alibi_slopes, dropout)
    if backend == "auto":
        backend = choose(q, k, v, mask, alibi_slopes, dropout)
    refuse(backend, q, mask, alibi_slopes, dropout)
    if backend in ("two_call", "flex") and not q.numel():
        backend = "math"  # PyTorch's have no empty batches and no empty rows
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "kernel":
        return kernel(q, k, v, mask.rows, scale, alibi_slopes)

    allowed = mask.dense() if backend in ("sdpa", "math") else None
    live, live_key = mask.live, mask.live_keys
    if allowed is not None:  # the square knows more: who sees nothing but padding, and whom nobody sees
        live, live_key = allowed.any(dim=-1)[:, 0], allowed.any(dim=-2)[:, 0]
    live, live_key = live[:, :, None, None], live_key[:, :, None, None]
    # a masked score has weight 0, but 0 * NaN is NaN: padding is cut out of the products and of their gradients
    q, k, v = torch.where(live, q, 0), torch.where(live_key, k, 0), torch.where(live_key, v, 0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if allowed is not None:
        allowed = allowed | ~live.squeeze(3)[:, None]  # softmax over no key is NaN; those rows are zeroed below
    if backend == "two_call":
        out = two_call(q, k, v, mask.images, scale)
    elif backend == "flex":
        out = flex(q, k, v, mask, scale, alibi_slopes)
    elif backend == "sdpa":
        out = sdpa(q, k, v, allowed, scale)
    else:
        out = math(q, k, v, allowed, scale, alibi_slopes, dropout)
    return torch.where(live, out.transpose(1, 2), 0)


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: GitMask, scale: float | None, alibi_slopes: Tensor | None, dropout: float
) -> None:
    """ValueError if the inputs do not fit each other, whatever backend is to serve them."""
    if not isinstance(mask, GitMask):
        found = type(mask).__name__
        raise ValueError(f"git_attention: the mask is a GitMask, found {found}; make one by GitMask.from_segments")
    rows, shapes = mask.rows, [tuple(x.shape) for x in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes) or k.shape[2] == 0 or q.shape[3] == 0:
        fits = False
    else:
        (batch, queries, heads, size), kv_heads = q.shape, k.shape[2]
        fits = heads % kv_heads == 0 and k.shape == v.shape == (batch, mask.kv_len, kv_heads, size)
        fits = fits and rows.ndim == 3 and len(rows) in (1, batch) and rows.shape[1:] == (queries, 2)
    if not fits:
        raise ValueError(
            f"git_attention: q {shapes[0]}, k {shapes[1]}, v {shapes[2]} and a mask of rows {tuple(rows.shape)} and "
            f"{mask.kv_len} keys do not fit; expected [B, S, H, D], [B, kv_len, Hk, D], H a multiple of Hk, and rows "
            "[B or 1, S, 2]"
        )
    if rows.dtype != torch.int32:
        raise ValueError(f"git_attention: rows of a GitMask are int32, found {rows.dtype}; convert them by .int()")
    if alibi_slopes is not None and alibi_slopes.shape != q.shape[2:3]:
        raise ValueError(
            f"git_attention: alibi_slopes are [H], one for each of {q.shape[2]} heads, found "
            f"{tuple(alibi_slopes.shape)}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        found = f"{q.dtype}, {k.dtype}, {v.dtype}".replace("torch.", "")
        raise ValueError(f"git_attention: q, k and v have one floating point dtype, found {found}; cast them")
    same_device("git_attention", q.device, k=k, v=v, mask=rows, alibi_slopes=alibi_slopes)
    if isinstance(scale, Tensor):  # the compiled op would take its number, and give it no gradient
        raise ValueError("git_attention: scale is a number, found a tensor; multiply q by one that is learned")
    if not 0.0 <= dropout <= 1.0:  # also NaN
        raise ValueError(f"git_attention: dropout={dropout}; expected a probability, from 0 to 1")


def refuse(backend: str, q: Tensor, mask: GitMask, alibi_slopes: Tensor | None, dropout: float) -> None:
    """ValueError if a backend lacks what is asked of it, naming one that has it."""
    if dropout > 0.0 and backend != "math":
        raise ValueError(f"git_attention: backend {backend!r} has no dropout (found {dropout}); use backend='math'")
    if alibi_slopes is not None and backend in ("sdpa", "two_call"):
        raise ValueError(f"git_attention: backend {backend!r} has no ALiBi; use backend='kernel' or 'math'")
    if backend == "two_call" and mask.images is None:
        raise ValueError(
            "git_attention: backend 'two_call' needs rows that begin with equally many image tokens, known on "
            "the host; make the mask by GitMask.from_lengths with an int for image_lens, padding='right' and no unused "
            "image_slots, or use backend='auto'"
        )
    if backend == "flex" and mask.kv_len != q.shape[1]:
        raise ValueError(
            f"git_attention: backend 'flex' needs as many queries as keys, found {q.shape[1]} and {mask.kv_len}; use "
            "backend='sdpa'"
        )
