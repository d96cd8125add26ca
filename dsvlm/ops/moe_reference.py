"""Expert routing in plain PyTorch: the meaning of the compiled ops, and what serves where they are absent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Gate(NamedTuple):
    """What the router says of each token, before any capacity.

    weight: [N, K] as combined; score: [N, K] softmax of the noisy logits at index, NaN in bad rows; index: [N, K];
    asks: [N, K] bool, the choice wants a row; bad: [N] bool; sums and lse as in `Routing`.
    """

    weight: Tensor
    score: Tensor
    index: Tensor
    asks: Tensor
    bad: Tensor
    prob_sum: Tensor
    ent_sum: Tensor
    z2_sum: Tensor
    loadp_sum: Tensor
    lse: Tensor


class Selection(NamedTuple):
    """Who got a row: slot [N, K], src [max_rows], offs [E], load and kept [E, P], all int32, as in `Routing`."""

    slot: Tensor
    src: Tensor
    offs: Tensor
    load: Tensor
    kept: Tensor


def gate(
    logits: Tensor,
    noise: Tensor | None,
    modality: Tensor | None,
    valid: Tensor | None,
    *,
    k: int,
    renormalize: bool,
    num_modalities: int,
    load_sigma: float,
) -> Gate:
    """Softmax, the k largest (equal ones by lower expert) and the sums for the auxiliary losses.

    logits: [N, E]; noise: [N, E] or None; modality: [N] integers or None; valid: [N] bool or None.
    """
    tokens, experts = logits.shape
    live = torch.ones(tokens, dtype=torch.bool, device=logits.device) if valid is None else valid
    clean = torch.where(live[:, None], logits.to(torch.promote_types(logits.dtype, torch.float32)), 0)
    noisy = clean if noise is None else clean + torch.where(live[:, None], noise, 0)
    top = noisy.detach().amax(dim=1) if experts else noisy.new_zeros(tokens)
    bad = ~top.isfinite()  # NaN and +inf win the maximum, -inf is one only of nothing else
    clean, noisy = (x + torch.where(bad, torch.nan, 0.0)[:, None].to(x.dtype) for x in (clean, noisy))

    ranked = torch.where(bad[:, None], 0, noisy.detach())
    index = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, :k]
    asks = live[:, None] & (ranked.gather(1, index) > -torch.inf)
    score = noisy.softmax(dim=1).gather(1, index)
    weight = score / score.sum(dim=1, keepdim=True) if renormalize else score
    weight = torch.where(live[:, None], weight, 0)

    lse = clean.logsumexp(dim=1)
    probs = clean.softmax(dim=1)
    log_probs = torch.where(probs > 0, clean - lse[:, None], 0)  # 0 log 0 = 0, with a gradient of 0
    kind = torch.zeros(tokens, dtype=torch.long, device=logits.device) if modality is None else modality.long()

    def per_modality(values: Tensor) -> Tensor:
        values = torch.where(live.view(-1, *[1] * (values.dim() - 1)), values, 0)
        return values.new_zeros((num_modalities, *values.shape[1:])).index_add(0, kind, values)

    if load_sigma > 0:
        eta = noisy.gather(1, index[:, -1:])
        margin = torch.where(clean == -torch.inf, -torch.inf, clean - eta)
        loadp_sum = per_modality(torch.special.ndtr(margin / load_sigma))
    else:
        loadp_sum = clean.new_zeros((num_modalities, experts))
    entropy = -(probs * log_probs).sum(dim=1)
    lse_out = torch.where(live, lse, 0).detach()
    sums = per_modality(probs), per_modality(entropy), per_modality(lse.square()), loadp_sum
    return Gate(weight, score.detach(), index, asks, bad, *sums, lse_out)


def select(
    score: Tensor,
    index: Tensor,
    asks: Tensor,
    bad: Tensor,
    pool: Tensor | None,
    *,
    experts: int,
    capacity: Sequence[int],
    max_rows: int,
    align: int,
    policy: str,
    slot_order: str,
) -> Selection:
    """Which choices get a row of their expert, and which row: stable sorts, one key after the other.

    score: [N, K] weights before renormalisation; index: [N, K]; asks: [N, K] bool; bad: [N] bool; pool: [N] or None.
    """
    (tokens, k), pools, device = index.shape, len(capacity), index.device
    group = torch.zeros(tokens, dtype=torch.long, device=device) if pool is None else pool.long()
    nowhere = experts * pools
    segment = torch.where(asks, index.long() * pools + group[:, None], nowhere).flatten()
    choice = torch.arange(k, device=device).repeat(tokens)

    if policy == "bpr":
        key = score[:, :1].expand(-1, k)
    elif policy == "position":
        key = torch.zeros_like(score)
    else:
        key, choice = score, torch.zeros_like(choice)
    key = torch.where(bad[:, None], -1.0, key).flatten()
    order = torch.sort(key, descending=True, stable=True).indices
    order = order[torch.sort(choice[order], stable=True).indices]
    order = order[torch.sort(segment[order], stable=True).indices]

    load = segment.new_zeros(nowhere + 1).index_add(0, segment, torch.ones_like(segment))[:-1]
    limit = torch.tensor([c if c >= 0 else tokens for c in capacity], device=device).repeat(experts)
    kept = load.minimum(limit)
    rank = _place_in_segment(order, segment, load)
    keep = (segment < nowhere) & (rank < F.pad(limit, (0, 1))[segment])
    if slot_order == "token":
        segment = torch.where(keep, segment, nowhere)
        rank = _place_in_segment(torch.sort(segment, stable=True).indices, segment, kept)

    in_expert = kept.view(experts, pools)
    offs = ((in_expert.sum(dim=1) + align - 1) // align * align).cumsum(dim=0)
    start = F.pad(offs, (1, 0))[:-1, None] + in_expert.cumsum(dim=1) - in_expert
    slot = torch.where(keep, F.pad(start.flatten(), (0, 1))[segment] + rank, -1)
    src = torch.full((max_rows + 1,), -1, device=device)
    src[torch.where(keep, slot, max_rows)] = torch.arange(tokens * k, device=device)
    parts = slot.view(tokens, k), src[:max_rows], offs, load.view(experts, pools), in_expert
    return Selection(*(part.to(torch.int32) for part in parts))


def _place_in_segment(order: Tensor, segment: Tensor, size: Tensor) -> Tensor:
    """Rank of each choice in its segment, from choices ordered by segment; meaningless for those that are nowhere."""
    first = F.pad(size.cumsum(dim=0), (1, 0))
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return place - first[segment]


def permute(x: Tensor, src: Tensor, k: int) -> Tensor:
    """Rows of the expert buffer from tokens: [N, d] -> [max_rows, d], zeros where src is -1."""
    token = torch.where(src >= 0, src.long() // k, x.shape[0])
    return F.pad(x, (0, 0, 0, 1)).index_select(0, token)


def combine(y: Tensor, weight: Tensor, slot: Tensor) -> Tensor:
    """Weighted sum of each token's rows: [max_rows, d] -> [N, d]; added in fp32 (fp64), rounded once."""
    padded = F.pad(y, (0, 0, 0, 1))
    total = 0.0
    for choice in range(slot.shape[1]):
        has, row = slot[:, choice] >= 0, slot[:, choice].long()
        rows = padded.index_select(0, torch.where(has, row, y.shape[0]))
        total = total + torch.where(has, weight[:, choice], 0)[:, None] * rows.to(weight.dtype)
    return total.to(y.dtype)
