"""Expert routing: which tokens go to which expert within its capacity, the way there and back; the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from dsvlm.ops import moe_reference as reference
from dsvlm.ops.library import same_device
from dsvlm.ops.moe_kernel import Combine, Permute, Route, kernel_refuses

BACKENDS = ("auto", "kernel", "torch")
POLICIES = ("bpr", "position", "probs")
SLOT_ORDERS = ("token", "priority")
MOST_ROWS = 2**31 - 2  # numbered in 32 bits; a larger capacity is no other than this one


class Routing(NamedTuple):
    """Where each token goes, and sums for the auxiliary losses (N tokens, E experts, P pools, M modalities).

    weight: [N, K] fp32 (fp64 for fp64 logits), differentiable; index: [N, K] int32, the experts, best first;
    slot: [N, K] int32, row in the expert buffer, -1 = dropped; src: [max_rows] int32, token * K + choice, -1 = empty;
    offs: [E] int32, end of each expert's rows, a multiple of align; load, kept: [E, P] int32, choices before, after;
    prob_sum: [M, E], ent_sum: [M], z2_sum: [M], loadp_sum: [M, E]: differentiable sums over the valid tokens of
    softmax, entropy (nats), squared logsumexp and load probability; lse: [N]; bad_rows: [] int32, rows with NaN or
    +inf or nothing but -inf: their weights are NaN.
    """

    weight: Tensor
    index: Tensor
    slot: Tensor
    src: Tensor
    offs: Tensor
    load: Tensor
    kept: Tensor
    prob_sum: Tensor
    ent_sum: Tensor
    z2_sum: Tensor
    loadp_sum: Tensor
    lse: Tensor
    bad_rows: Tensor


def moe_route(
    logits: Tensor,
    *,
    k: int,
    capacity: int | Sequence[int],
    policy: str = "bpr",
    slot_order: str = "token",
    noise: Tensor | None = None,
    modality: Tensor | None = None,
    valid: Tensor | None = None,
    pool: Tensor | None = None,
    max_rows: int | None = None,
    align: int = 8,
    renormalize: bool = False,
    num_modalities: int = 1,
    load_sigma: float = 0.0,
    backend: str = "auto",
) -> Routing:
    """Softmax over experts, the k best of each token, and at most `capacity` tokens per expert (and pool).

    logits: [N, E]; capacity: tokens per expert, or one number per pool, -1 = dropless; pool: [N], which of them a token
    counts against (default: its modality where there are several); a pool never influences another one's drops.
    policy, who is kept: "bpr" first choices before second ones, then tokens with the largest best weight (Batch
    Priority Routing, Riquelme et al. 2021); "position" first choices first, then by position; "probs" by own weight.
    slot_order: rows of an expert by "token" or by "priority"; no token's result depends on it.
    noise: [N, E], already scaled, added for the choice and the weights, not for the sums; modality: [N] below
    num_modalities; valid: [N] bool, False = padding. renormalize: weights of a token sum to 1 before drops.
    max_rows: rows of the expert buffer, default and minimum `rows_bound`; align: each expert's are a multiple of it.
    load_sigma: standard deviation of the noise, for the load loss; 0 = not computed.
    backend: "kernel" (compiled; no double backward), "torch" (reference), "auto". Nothing waits for the device.
    """
    limits = _limits(capacity)
    k, align, num_modalities = _whole("k", k), _whole("align", align), _whole("num_modalities", num_modalities)
    _check_route(logits, k, limits, policy, slot_order, align, num_modalities, load_sigma)
    tokens, experts = logits.shape
    if pool is None and len(limits) > 1:
        if modality is None or num_modalities != len(limits):
            raise ValueError(
                f"moe_route: {len(limits)} capacities need to know the pool of each token: give pool, or modality with "
                f"num_modalities={len(limits)} (found {num_modalities})"
            )
        pool = modality
    bound = rows_bound(tokens, experts, k, limits, align)
    max_rows = bound if max_rows is None else _whole("max_rows", max_rows)
    if max_rows < bound:
        raise ValueError(f"moe_route: max_rows={max_rows}, but {bound} rows may be needed; see rows_bound")
    if max_rows > MOST_ROWS:
        raise ValueError(
            f"moe_route: {max_rows} rows (max_rows, or what align={align} makes of {tokens} tokens) cannot be numbered "
            f"in 32 bits; expected at most {MOST_ROWS}"
        )
    for name, given, shape in (
        ("noise", noise, (tokens, experts)),
        ("modality", modality, (tokens,)),
        ("valid", valid, (tokens,)),
        ("pool", pool, (tokens,)),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(f"moe_route: {name} is {list(given.shape)}, expected {list(shape)} as logits say")
    same_device("moe_route", logits.device, noise=noise, modality=modality, valid=valid, pool=pool)
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"moe_route: valid is {valid.dtype}, expected torch.bool (True = a token, False = padding)")
    for name, given, below in (("modality", modality, num_modalities), ("pool", pool, len(limits))):
        _check_numbers(name, given, below)
    noise = None if noise is None else noise.detach().to(torch.promote_types(logits.dtype, torch.float32))
    if _served_by_kernel("moe_route", backend, logits):
        modality, pool = (x if x is None else _in_bytes(x) for x in (modality, pool))
        logits, *given = (x if x is None else x.contiguous() for x in (logits, noise, modality, valid, pool))
        sizes = k, limits, max_rows, align, policy, slot_order, renormalize, num_modalities, load_sigma
        return Routing(*Route.apply(logits, *given, *sizes))
    said = reference.gate(
        logits, noise, modality, valid, k=k, renormalize=renormalize, num_modalities=num_modalities,
        load_sigma=load_sigma,
    )  # fmt: skip
    chosen = reference.select(
        said.score, said.index, said.asks, said.bad, pool, experts=experts, capacity=limits, max_rows=max_rows,
        align=align, policy=policy, slot_order=slot_order,
    )  # fmt: skip
    sums = said.prob_sum, said.ent_sum, said.z2_sum, said.loadp_sum
    return Routing(said.weight, said.index.to(torch.int32), *chosen, *sums, said.lse, said.bad.sum(dtype=torch.int32))


def moe_permute(x: Tensor, src: Tensor, slot: Tensor, *, backend: str = "auto") -> Tensor:
    """Copies tokens to the rows of their experts: [N, d] -> [max_rows, d]; empty rows are 0, also in the gradient.

    x: [N, d]; src: [max_rows], slot: [N, K] of a `Routing`.
    """
    if x.dim() != 2 or src.dim() != 1 or slot.dim() != 2 or slot.shape[0] != x.shape[0]:
        raise ValueError(
            f"moe_permute: x {list(x.shape)}, src {list(src.shape)} and slot {list(slot.shape)} do not fit; expected "
            "[N, d], [max_rows], [N, K]"
        )
    same_device("moe_permute", x.device, src=src, slot=slot)
    if _served_by_kernel("moe_permute", backend, x):
        return Permute.apply(x.contiguous(), src.contiguous(), slot.contiguous())
    return reference.permute(x, src, slot.shape[1])


def moe_combine(y: Tensor, weight: Tensor, slot: Tensor, src: Tensor, *, backend: str = "auto") -> Tensor:
    """Brings expert outputs back to tokens: [max_rows, d] -> [N, d], sum of weight * y[slot]; dropped choices add 0.

    y: [max_rows, d]; weight: [N, K] fp32 (fp64), slot: [N, K], src: [max_rows] of a `Routing`. Empty rows may hold NaN.
    """
    if y.dim() != 2 or src.shape != y.shape[:1] or weight.shape != slot.shape:
        raise ValueError(
            f"moe_combine: y {list(y.shape)}, src {list(src.shape)}, weight {list(weight.shape)} and slot "
            f"{list(slot.shape)} do not fit; expected [max_rows, d], [max_rows], [N, K], [N, K]"
        )
    same_device("moe_combine", y.device, weight=weight, slot=slot, src=src)
    weight = weight.to(torch.promote_types(y.dtype, torch.float32))
    if _served_by_kernel("moe_combine", backend, y):
        return Combine.apply(*(each.contiguous() for each in (y, weight, slot, src)))
    return reference.combine(y, weight, slot)


def rows_bound(tokens: int, experts: int, k: int, capacity: int | Sequence[int], align: int = 8) -> int:
    """Rows that the expert buffer can need, whatever the logits: the smallest `max_rows` that `moe_route` takes."""
    limits = _limits(capacity)
    one = tokens if min(limits) < 0 else min(tokens, sum(limits))
    of_capacity = experts * (-(-one // align) * align)
    of_tokens = (tokens * k + experts * (align - 1)) // align * align
    return min(of_capacity, of_tokens)


def _limits(capacity: int | Sequence[int]) -> tuple[int, ...]:
    try:
        limits = tuple(map(index, capacity)) if isinstance(capacity, Sequence) else (index(capacity),)
    except TypeError:
        raise ValueError(f"moe_route: capacity={capacity!r}; expected an integer, or a list of them") from None
    return tuple(min(limit, MOST_ROWS) for limit in limits)


def _whole(name: str, value: int) -> int:
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"moe_route: {name}={value!r}; expected an integer") from None


def _check_numbers(name: str, given: Tensor | None, below: int) -> None:
    """Values on the CPU alone: a device would have to be waited for, and a compiled graph has none yet."""
    if given is not None and (given.is_floating_point() or given.is_complex()):
        raise ValueError(f"moe_route: {name} is {given.dtype}, expected integers")
    if given is None or not given.numel() or given.device.type != "cpu" or torch.compiler.is_compiling():
        return
    least, most = (int(x) for x in given.long().aminmax())
    if least < 0 or most >= below:
        raise ValueError(f"moe_route: {name} has numbers from {least} to {most}, expected 0 to {below - 1}")


def _in_bytes(numbers: Tensor) -> Tensor:
    """As uint8; what does not fit, where nobody could look, is 255, which the op refuses or takes for the last one."""
    if numbers.dtype in (torch.uint8, torch.bool):
        return numbers.to(torch.uint8)
    numbers = numbers.long()
    return torch.where((numbers >= 0) & (numbers < 255), numbers, 255).to(torch.uint8)


def _served_by_kernel(name: str, backend: str, x: Tensor) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"{name}: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return False
    problem = kernel_refuses(x)
    if problem and backend == "kernel":
        raise ValueError(f"{name}: backend 'kernel': {problem}")
    return not problem


def _check_route(
    logits: Tensor,
    k: int,
    limits: tuple[int, ...],
    policy: str,
    slot_order: str,
    align: int,
    num_modalities: int,
    load_sigma: float,
) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"moe_route: logits are {list(logits.shape)} {logits.dtype}, expected [N, E] floating point")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"moe_route: k={k} choices of {logits.shape[1]} experts; expected 1 <= k <= E")
    for name, value, allowed in (("policy", policy, POLICIES), ("slot_order", slot_order, SLOT_ORDERS)):
        if value not in allowed:
            raise ValueError(f"moe_route: unknown {name} {value!r}; choose one of {', '.join(allowed)}")
    if not 1 <= len(limits) <= 256 or min(limits) < -1:
        raise ValueError(f"moe_route: capacity={limits}; expected 1 to 256 numbers >= 0, or -1 for dropless")
    if align < 1 or not 1 <= num_modalities <= 256 or not (load_sigma == 0 or 1e-30 <= load_sigma < float("inf")):
        raise ValueError(
            f"moe_route: align={align}, num_modalities={num_modalities}, load_sigma={load_sigma}; expected align >= 1, "
            "1 to 256 modalities, load_sigma 0 or at least 1e-30 (divisions by less leave fp32's range)"
        )
