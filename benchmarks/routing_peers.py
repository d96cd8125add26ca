"""Who is measured by the routing benchmark: gating with its auxiliary loss, and the whole way to the experts and back.

Ours is the fused op; the others are what exists elsewhere, in plain torch: DeepSpeed's own functions where DeepSpeed is
installed, the sequences of Tutel and of Megatron-Core's unfused path after their documentation, and the best eager one
we know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsvlm.ops import moe_combine, moe_permute, moe_route
from dsvlm.ops.moe_kernel import has_kernel

OURS, DEEPSPEED, TUTEL = "ours", "DeepSpeed top-1", "eager BPR, Tutel's way"
SORTED, MEGATRON = "eager BPR, by sorting", "Megatron's unfused way"


class Unavailable(Exception):
    """Why a competitor cannot run this case here."""


@dataclass(frozen=True)
class Case:
    """N tokens of a width, E experts, K choices of each; rows per expert 5 % above the mean."""

    name: str
    tokens: int
    width: int
    experts: int
    k: int = 1

    @property
    def capacity(self) -> int:
        return -(-self.tokens * self.k * 105 // (self.experts * 100))


@dataclass(frozen=True)
class Peer:
    """gate: (case, logits) -> (weights of the choices, auxiliary loss, plan); move: (case, x, weights, plan) -> result.

    bpr: keeps whom Batch Priority Routing keeps, so that its result is compared.
    """

    name: str
    gate: Callable[[Case, Tensor], tuple[Tensor, Tensor, Any]]
    move: Callable[[Case, Tensor, Tensor, Any], Tensor]
    bpr: bool = True


def balance(probs_sum: Tensor, load: Tensor, case: Case) -> Tensor:
    """Load-balancing loss of Switch Transformers: E * sum of (mean probability * share of tokens)."""
    return torch.dot(probs_sum, load * (case.experts / case.tokens**2))


def gate_ours(case: Case, logits: Tensor) -> tuple[Tensor, Tensor, Any]:
    if not has_kernel(logits.device.type):
        raise Unavailable(f"the library is not built, or has no code for {logits.device.type}")
    found = moe_route(logits, k=case.k, capacity=case.capacity, backend="kernel")
    loss = found.prob_sum @ (found.load * (case.experts / case.tokens**2))  # `balance`, of shapes that need no change
    return found.weight, loss, found


def move_ours(case: Case, x: Tensor, weight: Tensor, plan: Any) -> Tensor:
    rows = moe_permute(x, plan.src, plan.slot, backend="kernel")
    return moe_combine(rows, weight, plan.slot, plan.src, backend="kernel")


def gate_deepspeed(case: Case, logits: Tensor) -> tuple[Tensor, Tensor, Any]:
    if case.k > 1:
        raise Unavailable("one choice only")
    try:
        from deepspeed.moe import sharded_moe
    except ImportError:
        raise Unavailable("not installed") from None
    found = sharded_moe.top1gating(logits, 1.05, 1, sparse_routes=True)  # the path of its own layer
    loss, capacity, experts, index, location, weight, _ = found
    capacity = int(capacity)
    return weight.t(), loss, (sharded_moe._route_slots(index, location, experts, capacity), capacity)


def move_deepspeed(case: Case, x: Tensor, weight: Tensor, plan: tuple[Tensor, int]) -> Tensor:
    from deepspeed.moe import sharded_moe

    slots, capacity = plan
    rows = sharded_moe._sparse_encode(x, slots, case.experts, capacity)
    return sharded_moe._sparse_decode(rows.flatten(0, 1), slots, weight.t(), case.tokens)


def gate_tutel(case: Case, logits: Tensor) -> tuple[Tensor, Tensor, Any]:
    """One-hot masks in order of priority, a cumulative sum for the places, one choice after the other."""
    probs = logits.softmax(dim=1, dtype=torch.float32)
    weight, index = probs.topk(case.k, dim=1)
    order = weight[:, 0].argsort(descending=True)
    back = order.argsort()
    masks = [F.one_hot(index[:, choice], case.experts) for choice in range(case.k)]
    before = masks[0].new_zeros(case.experts)
    slots = []
    for choice, mask in enumerate(masks):
        place = ((mask[order].cumsum(dim=0) - 1)[back] + before).gather(1, index[:, choice, None])[:, 0]
        before = before + mask.sum(dim=0)
        slots.append(torch.where(place < case.capacity, index[:, choice] * case.capacity + place, -1))
    loss = balance(probs.sum(dim=0), masks[0].sum(dim=0), case)
    return weight, loss, torch.stack(slots, dim=1)


def gate_sorted(case: Case, logits: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Two stable sorts: tokens by priority, then choices by expert; nothing of the size N x E but the softmax."""
    probs = logits.softmax(dim=1, dtype=torch.float32)
    weight, index = (probs.max(dim=1, keepdim=True)) if case.k == 1 else probs.topk(case.k, dim=1)
    order = weight[:, 0].detach().argsort(descending=True, stable=True)
    expert = index[order].t().flatten()  # first choices before second ones, each by priority
    by_expert = expert.argsort(stable=True)
    load = expert.new_zeros(case.experts).scatter_add_(0, expert, torch.ones_like(expert))
    start = load.cumsum(dim=0) - load
    place = torch.empty_like(expert)
    place[by_expert] = torch.arange(len(expert), device=expert.device) - start[expert[by_expert]]
    slot = torch.where(place < case.capacity, expert * case.capacity + place, -1)
    slots = torch.empty_like(index)
    slots[order] = slot.view(case.k, -1).t()
    return weight, balance(probs.sum(dim=0), load, case), slots


def move_by_slots(case: Case, x: Tensor, weight: Tensor, slots: Tensor) -> Tensor:
    """Gathers both ways: the routing is inverted once, a row of zeros stands for what has no place."""
    rows, tokens = case.experts * case.capacity, torch.arange(case.tokens, device=x.device)
    source = torch.full((rows + 1,), case.tokens, device=x.device)
    place = torch.where(slots < 0, rows, slots)
    source.scatter_(0, place.flatten(), tokens[:, None].expand_as(slots).flatten())
    buffer = torch.cat((x, x.new_zeros(1, case.width))).index_select(0, source[:-1])
    routed = torch.cat((buffer, buffer.new_zeros(1, case.width))).index_select(0, place.flatten())
    return (routed.view(case.tokens, case.k, -1) * weight[..., None]).sum(dim=1).to(x.dtype)


def gate_megatron(case: Case, logits: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Dense [N, E] probabilities and map; each expert keeps its largest; rows by a sort of the map."""
    probs = logits.softmax(dim=1, dtype=torch.float32)
    weight, index = probs.topk(case.k, dim=1)
    dense = torch.zeros_like(probs).scatter(1, index, weight)
    wanted = torch.zeros_like(probs, dtype=torch.int32).scatter(1, index, 1).bool()
    loss = balance(probs.sum(dim=0), wanted.sum(dim=0), case)
    best = dense.topk(min(case.capacity, case.tokens), dim=0).indices
    kept = wanted & torch.zeros_like(wanted).scatter(0, best, True)
    source = kept.t().to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : case.capacity]
    return dense * kept, loss, source


def move_megatron(case: Case, x: Tensor, dense: Tensor, source: Tensor) -> Tensor:
    buffer = x.index_select(0, source.flatten())
    weight = dense.t().gather(1, source).flatten()  # 0 where a row has no token of its own
    weighted = buffer * weight[:, None]
    out = torch.zeros(x.shape, dtype=weighted.dtype, device=x.device)
    return out.scatter_add_(0, source.flatten()[:, None].expand_as(weighted), weighted).to(x.dtype)


PEERS = (
    Peer(OURS, gate_ours, move_ours),
    Peer(DEEPSPEED, gate_deepspeed, move_deepspeed, bpr=False),  # drops tokens at random
    Peer(TUTEL, gate_tutel, move_by_slots),
    Peer(SORTED, gate_sorted, move_by_slots),
    Peer(MEGATRON, gate_megatron, move_megatron, bpr=False),  # by own weight: equal for one choice only
)
