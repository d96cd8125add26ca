"""`MoeLayer`: experts in the place of a feed-forward network, with one signature whatever is routed where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsvlm.model.moe_experts import Experts
from dsvlm.model.moe_groups import Groups, MoeContext, keyed_normal
from dsvlm.ops import expert_capacity, moe_combine, moe_permute, moe_route, most_pools

if TYPE_CHECKING:
    from dsvlm.config import MoeConfig
    from dsvlm.model.moe_parallel import ExpertParallel
    from dsvlm.ops import Routing

ALIGN = 8  # rows: what an expert's of bf16 must be a multiple of in torch's grouped matrix product
MOST_GROUPS = 256  # of one routing call, or fewer where there are many experts


def most_groups(experts: int) -> int:
    """Groups of one routing call, the same on all devices."""
    return min(MOST_GROUPS, most_pools(experts))


class MoeLayer(nn.Module):
    """Router, capacity, experts: the same modules in every forward, also where no token comes to an expert.

    name: in metrics; text: whether its tokens are the decoder's rows, not images. A token without an expert (dropped,
    or padding) gives 0: the residual connection around a feed-forward network passes it on unchanged.
    `context` says whose the tokens are; the model sets it before each forward. `parallel` shares the experts' work.
    """

    def __init__(self, name: str, config: MoeConfig, experts: Experts, text: bool):
        super().__init__()
        self.name, self.config, self.text = name, config, text
        self.router = Router(experts.size, config.experts)
        self.experts = experts
        self.context: MoeContext | None = None
        self.parallel: ExpertParallel | None = None

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on logits: noise / E, as in V-MoE (Riquelme et al. 2021)."""
        return self.config.noise / self.config.experts

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] tokens of the batch; returns [..., D out]."""
        groups = self.groups(x)
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens)
        noise = self.noise(groups, logits) if self.training and self.config.noise > 0 else None
        parts, first = [], 0
        for part in groups.split(most_groups(self.config.experts)):
            here = slice(first, first := first + part.group.numel())
            parts.append(self.route(logits[here], None if noise is None else noise[here], part))
        # The experts run once, however many parts: under ZeRO-3 their weights are gathered for it, on all ranks.
        weight, slot, src, offs, most = joined(parts)
        rows = moe_permute(tokens, src, slot)
        experts = self.experts if self.parallel is None else self.parallel(self.experts)
        out = moe_combine(experts(rows, offs, src >= 0, most), weight, slot, src)
        return out.view(*x.shape[:-1], out.shape[-1])

    def groups(self, x: Tensor) -> Groups:
        """Whose the tokens are; those of cached decoding, which come without the prompt's, are text."""
        count = x.numel() // x.shape[-1]
        known = self.context and (self.context.rows if self.text else self.context.images)
        if known is not None and known.group.numel() == count:
            return known
        assert self.text and not self.training, f"{self.name}: the batch does not tell of {tuple(x.shape)} tokens"
        return Groups.of_text(count, x.device)

    def noise(self, groups: Groups, logits: Tensor) -> Tensor:
        shape = torch.Size((*groups.group.shape, logits.shape[1]))
        return keyed_normal(groups.keys, shape, groups.position).to(logits.dtype).view_as(logits) * self.sigma

    def route(self, logits: Tensor, noise: Tensor | None, groups: Groups) -> tuple[Routing, int]:
        """At most `most_groups`. logits, noise: [n, E]; returns also the rows of an expert at most."""
        config, group = self.config, groups.group.flatten()
        limit = -1  # dropless
        if config.capacity_factor > 0 and groups.images:
            limit = expert_capacity(groups.budget, config.experts, config.k, config.capacity_factor)
        limits = [limit] * groups.images + [-1] * (groups.size - groups.images)
        routed = moe_route(
            logits, k=config.k, capacity=limits, policy=config.policy, noise=noise, modality=group, pool=group,
            valid=groups.valid.flatten(), num_modalities=groups.size, renormalize=config.renormalize, align=ALIGN,
            load_sigma=0.0 if noise is None else self.sigma,
        )  # fmt: skip
        if self.context is not None:
            self.context.tell(self.name, groups, routed)
        most = len(group) if -1 in limits else min(len(group), sum(limits))
        return routed, -(-most // ALIGN) * ALIGN


def joined(parts: list[tuple[Routing, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """weight, slot, src, offs of a `Routing` of all tokens, from those of its parts, and the rows of an expert at most.

    An expert's rows are those of the first part, then those of the next.
    """
    if len(parts) == 1:
        ((one, most),) = parts
        return one.weight, one.slot, one.src, one.offs, most
    routed = [part for part, _ in parts]
    starts = torch.stack([F.pad(part.offs, (1, -1)) for part in routed])
    ends = (torch.stack([part.offs for part in routed]) - starts).T.flatten().cumsum(0, dtype=torch.int32)
    places = F.pad(ends, (1, -1)).view(-1, len(parts)).T
    slot = torch.cat([
        torch.where(part.slot >= 0, part.slot + shift[part.index.long()], -1)
        for part, shift in zip(routed, places - starts, strict=True)
    ])  # fmt: skip
    rows, number = sum(len(part.src) for part in routed), torch.arange(slot.numel(), device=slot.device)
    src = slot.new_full((rows + 1,), -1)
    src[torch.where(slot >= 0, slot, rows).flatten().long()] = number.to(src.dtype)
    weight = torch.cat([part.weight for part in routed])
    return weight, slot, src[:rows], ends[len(parts) - 1 :: len(parts)].contiguous(), sum(most for _, most in parts)


class Router(nn.Module):
    """Logits of the experts, computed in fp32 at least: in bf16 many would be equal."""

    def __init__(self, size: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size))
        nn.init.normal_(self.weight, std=size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, D]; returns [N, E] fp32, or fp64."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"  # meta has none
        with torch.autocast(device, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))
