"""Auxiliary losses of expert routing, from sums that may have been added over micro-steps and ranks before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LimoeAux(NamedTuple):
    """The losses, unweighted, and the entropy that the global one bounds.

    importance, load, z: []; local_entropy, global_entropy: [M], nats; mean_entropy: [M], entropy of the mean softmax.
    """

    importance: Tensor
    load: Tensor
    z: Tensor
    local_entropy: Tensor
    global_entropy: Tensor
    mean_entropy: Tensor


def limoe_aux(
    prob_sum: Tensor, ent_sum: Tensor, z2_sum: Tensor, loadp_sum: Tensor, count: Tensor, tau: Tensor | Sequence[float]
) -> LimoeAux:
    """Importance and load (V-MoE), z-loss (ST-MoE), local and global entropy per modality (LIMoE, Mustafa et al. 2022).

    prob_sum, loadp_sum: [M, E]; ent_sum, z2_sum: [M], of a `Routing`, or sums of several; count: [M], the valid tokens
    in them; tau: [M] nats, log(S) asks for at least S experts. importance and load are (std / mean)^2 over experts of
    all modalities together; z the mean square of logsumexp; local the mean entropy, global max(0, tau - entropy of the
    mean softmax). What has no tokens is 0, with a gradient of 0.
    """
    count = torch.as_tensor(count, dtype=prob_sum.dtype, device=prob_sum.device)
    tau = torch.as_tensor(tau, dtype=prob_sum.dtype, device=prob_sum.device)
    tables = {"prob_sum": prob_sum, "loadp_sum": loadp_sum}
    numbers = {"ent_sum": ent_sum, "z2_sum": z2_sum, "count": count, "tau": tau}
    fits = prob_sum.dim() == 2 and loadp_sum.shape == prob_sum.shape
    if not fits or any(x.shape != prob_sum.shape[:1] for x in numbers.values()):
        found = ", ".join(f"{name} {list(x.shape)}" for name, x in (tables | numbers).items())
        raise ValueError(f"limoe_aux: {found} do not fit; expected [M, E] for the first two, [M] for the others")
    present, safe = count > 0, count.clamp(min=1)
    mean = prob_sum / safe[:, None]
    mean_entropy = -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum(dim=1)
    return LimoeAux(
        importance=_squared_variation(prob_sum.sum(dim=0)),
        load=_squared_variation(loadp_sum.sum(dim=0)),
        z=z2_sum.sum() / count.sum().clamp(min=1),
        local_entropy=torch.where(present, ent_sum / safe, 0),
        global_entropy=torch.where(present, (tau - mean_entropy).clamp(min=0), 0),
        mean_entropy=mean_entropy.detach(),
    )


def _squared_variation(values: Tensor) -> Tensor:
    """(standard deviation / mean)^2 of nonnegative values, 0 where all are 0; the population's variance."""
    mean = values.mean()
    some = mean != 0  # also for NaN, which must show
    return torch.where(some, (values - mean).square().mean() / torch.where(some, mean, 1).square(), 0)
