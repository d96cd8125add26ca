"""Expert routing in a run: figures for its metrics."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from dsvlm.config import MoeConfig

if TYPE_CHECKING:
    from dsvlm.model.git import GitVlm


def layer_names(model: GitVlm) -> list[str]:
    from dsvlm.model.moe_place import moe_layers

    return [layer.name for layer in moe_layers(model)]


def routing_row(config: MoeConfig | None, layers: list[str], figures: np.ndarray) -> dict:
    """What metrics.jsonl says of routing, by "layer.modality"; nothing for a model without experts.

    figures: [layers, 2, columns], as in `moe_losses.Told`, summed over the window. moe_success: share of choices that
    got a row; moe_load: share of the choices that each expert was asked for; moe_busiest: its largest times the number
    of experts, 1 = balanced; moe_entropy: of a group's mean softmax, moe_token_entropy: of a token's (nats, means over
    groups); moe_loss: each loss without its weight; moe_bad_tokens: tokens whose router logits are no numbers, of which
    the first ones of a layer are a warning.
    """
    if config is None:
        return {}
    from dsvlm.model.moe_losses import LOSSES, MODALITIES, SUMS

    kinds = ("success", "load", "busiest", "entropy", "token_entropy", "loss", "bad_tokens")
    rows: dict[str, dict] = {kind: {} for kind in kinds}
    for layer, both in zip(layers, figures, strict=True):
        for modality, row in zip(MODALITIES, both, strict=True):
            if not row[0]:
                continue
            name, sums = f"{layer}.{modality}", dict(zip(SUMS, row, strict=False))
            load, kept = row[len(SUMS) :].reshape(3, -1)[:2]
            rows["success"][name] = kept.sum() / max(load.sum(), 1)
            rows["load"][name] = (load / max(load.sum(), 1)).round(6).tolist()
            rows["busiest"][name] = load.max() / max(load.mean(), 1e-9)
            rows["entropy"][name] = sums["entropy"] / sums["groups"]
            rows["token_entropy"][name] = sums["local_entropy"] / sums["groups"]
            rows["loss"] |= {f"{name}.{loss}": sums[loss] / sums["groups"] for loss in LOSSES}
            rows["bad_tokens"][name] = int(sums["bad_tokens"])
            if sums["bad_tokens"]:
                warn_of_bad_tokens(name)
    return {f"moe_{kind}": found for kind, found in rows.items()}


def warn_of_bad_tokens(name: str) -> None:
    """On the first rank, in the same words whenever it happens: Python then shows them once."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(
            f"the router of {name} gave logits that are NaN or infinite (moe_bad_tokens in metrics.jsonl counts them): "
            "such a window's loss and gradient are no numbers either, and its update is skipped; if it goes on, begin "
            "another run with a lower optim.lr or a smaller optim.clip",
            stacklevel=1,
        )
