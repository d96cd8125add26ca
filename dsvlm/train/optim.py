"""AdamW with per-part learning rates, and the learning rate as a pure function of the step."""

import math
import re

from dsvlm.config import OptimConfig


def lr_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Share of the learning rate for update `step` (0-based): linear warm-up, then cosine, linear or constant.

    With cosine and linear the last update of a run of `steps` updates gets `optim.floor`.
    """
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return 1.0
    progress = (step - optim.warmup) / max(1, steps - 1 - optim.warmup)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return optim.floor + (1 - optim.floor) * max(0.0, fall)


def parameter_groups(model, optim: OptimConfig) -> list[dict]:
    """Trainable parameters by the first pattern that matches their name; the rest take the recipe's own settings.

    Biases, norms and other vectors get no weight decay. Experts that ranks share are in groups of their own, marked as
    DeepSpeed wants them (`train.experts`). Raises ValueError for a pattern that matches nothing.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("model.freeze, model.train: nothing is left to train")
    groups: dict[tuple, dict] = {}
    used = set()
    for name, parameter in named:
        index = next((i for i, g in enumerate(optim.groups) if re.search(g.match, name)), None)
        used.add(index)
        chosen = optim.groups[index] if index is not None else None
        lr = optim.lr if chosen is None or chosen.lr is None else chosen.lr
        decay = optim.weight_decay if chosen is None or chosen.weight_decay is None else chosen.weight_decay
        decay = 0.0 if parameter.ndim < 2 or name.endswith("bias") else decay  # experts' biases are [E, size]
        shared = getattr(parameter, "group_name", None)
        marks = {"moe": True, "name": shared} if shared else {}
        settings = {"params": [], "lr": 0.0, "base_lr": lr, "weight_decay": decay}
        group = groups.setdefault((lr, decay, shared), settings | marks)
        group["params"].append(parameter)
    for index, group in enumerate(optim.groups):
        if index not in used:
            raise ValueError(
                f"optim.groups[{index}].match: {group.match!r} is the first match of no trainable parameter; "
                f"names look like {', '.join(name for name, _ in named[:3])}"
            )
    return list(groups.values())


def make_optimizer(model, optim: OptimConfig):
    import torch

    return torch.optim.AdamW(parameter_groups(model, optim), lr=0.0, betas=tuple(optim.betas), eps=optim.eps)


def set_lr(optimizer, factor: float) -> float:
    """Sets every group's learning rate; returns the first one's."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]
