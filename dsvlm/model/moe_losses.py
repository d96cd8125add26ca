"""Losses that keep routing in balance, per group and weighted like every loss; and figures about routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsvlm.model.moe_groups import Groups
from dsvlm.ops import limoe_aux

if TYPE_CHECKING:
    from dsvlm.config import MoeConfig, MoeLosses
    from dsvlm.ops import Routing

LOSSES = ("importance", "load", "z", "local_entropy", "global_entropy")
MODALITIES = ("image", "text")
# Columns of figures; after them E each of load, kept and probability.
SUMS = ("groups", "tokens", "bad_tokens", "entropy", *LOSSES)


@dataclass(frozen=True)
class Told:
    """What all layers of a forward pass add to the loss, and figures of them.

    loss: [2], for images and for texts: sums over those that teach, to be divided by their number in the window;
    figures: [layers, 2, len(SUMS) + 3 E] fp64, detached sums over the groups that teach, by modality.
    """

    loss: Tensor
    figures: Tensor


def check_gradient(told: list[tuple[str, Groups, Routing]], training: set[str], config: MoeConfig) -> None:
    """ValueError where losses are asked for and layers that train, by name, told of their routing without a graph."""
    if not torch.is_grad_enabled() or not any(weights_of(config.image) + weights_of(config.text)):
        return
    if lost := {name for name, _, routed in told if name in training and not routed.prob_sum.requires_grad}:
        raise ValueError(
            f"model.moe: the losses of {', '.join(sorted(lost))} would have no gradient, as layers are recomputed by "
            "reentrant checkpointing; take activation_checkpointing_enable({'use_reentrant': False})"
        )


def summarise(told: list[tuple[str, Groups, Routing]], layers: list[str], config: MoeConfig) -> Told:
    """Losses are means over layers (those with the modality) and over groups, each group's a function of itself.

    A nonlinear loss of the whole window's sums would need them before the first backward; the mean over groups, which
    is V-MoE's too, is a sum over micro-steps and ranks, so it is the same for any number of them.
    """
    loss, figures = 0.0, {}
    seeing = [len({n for n, g, _ in told if g.images}), len({n for n, g, _ in told if g.size > g.images})]
    for name, groups, routed in told:
        aux, entropy = group_losses(groups, routed, config)
        for kind, (weights, here) in enumerate(
            ((config.image, slice(groups.images)), (config.text, slice(groups.images, groups.size)))
        ):
            share = groups.share[here].to(aux.dtype)
            sums = torch.where(share > 0, aux[:, here] * share, 0).sum(dim=1)
            factors = aux.new_tensor(weights_of(weights)) / max(seeing[kind], 1)
            part = torch.where(factors > 0, sums * factors, 0).sum()
            loss = loss + torch.stack((part, torch.zeros_like(part)) if kind == 0 else (torch.zeros_like(part), part))
            row = figures_of(groups, routed, entropy, sums, here)
            figures[name, kind] = figures[name, kind] + row if (name, kind) in figures else row
    table = torch.stack([torch.stack([figures[name, kind] for kind in (0, 1)]) for name in layers])
    return Told(loss, table)


def group_losses(groups: Groups, routed: Routing, config: MoeConfig) -> tuple[Tensor, Tensor]:
    """[5, G] LOSSES of each group, unweighted; [G] entropy of its mean softmax (detached)."""
    tau = [config.image.tau] * groups.images + [config.text.tau] * (groups.size - groups.images)
    tau = routed.ent_sum.new_tensor(tau)
    sums = (routed.prob_sum, routed.ent_sum, routed.z2_sum, routed.loadp_sum, groups.tokens, tau)
    aux = torch.func.vmap(limoe_aux)(*(part[:, None] for part in sums))
    losses = [getattr(aux, name) for name in LOSSES]
    return torch.stack([part.flatten() for part in losses]), aux.mean_entropy.flatten().detach()


def weights_of(losses: MoeLosses) -> list[float]:
    return [getattr(losses, name) for name in LOSSES]


@torch.no_grad()
def figures_of(groups: Groups, routed: Routing, entropy: Tensor, losses: Tensor, here: slice) -> Tensor:
    """One row of figures: groups that teach, their tokens, those whose logits are no numbers, entropy and losses, and
    [E] load, kept, probability."""
    share = groups.share[here]
    live = (share > 0).double()
    tokens = (groups.tokens[here] * live).sum()
    bad = torch.zeros_like(groups.share).index_add(0, groups.group.flatten().long(), bad_tokens(routed).long())
    bad = (bad[here] * live).sum()
    scalars = torch.stack((share.double().sum(), tokens, bad, (entropy[here] * share).double().sum()))
    by_expert = [(part[:, here].double() @ live) for part in (routed.load, routed.kept)]
    probability = torch.where(live[:, None] > 0, routed.prob_sum[here].double(), 0).sum(dim=0)
    return torch.cat((scalars, losses.double(), *by_expert, probability))


def bad_tokens(routed: Routing) -> Tensor:
    """[N] bool: those that `Routing.bad_rows` counts, whose weights are NaN; padding has weights of 0."""
    return routed.weight[:, 0].isnan()
