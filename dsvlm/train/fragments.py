"""Full training state of a parameter under any ZeRO stage: which slice this rank owns, and all of it together.

A fragment is a rank's slice of a flat tensor: of the fp32 master weight (key None) or of an optimizer state (`exp_avg`,
`exp_avg_sq`). Checkpoints are made of whole tensors, so they fit any number of ranks and any stage.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dsvlm.model.moe_parallel import share_of

STATES = ("exp_avg", "exp_avg_sq")


def trainable(engine) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Trainable parameters by name, in an order that is the same on all ranks."""
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def shape_of(parameter) -> torch.Size:
    """Of the whole parameter."""
    share = share_of(parameter)
    return getattr(parameter, "ds_shape", parameter.shape) if share is None else share.whole


def is_cut(parameter) -> bool:
    """Whether a rank may own a part of it only."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") or share_of(parameter) is not None


def fragment(engine, parameter, key: str | None = None) -> tuple[int, Tensor] | None:
    """(start, values) of this rank's slice of the flat tensor; None when it owns nothing of it.

    values: 1-D, detached; a view where the engine keeps it on the device: write through `write_fragment`.
    """
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        values = (
            safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
        )
        start = dist.get_rank() * values.numel()
        owned = max(0, min(values.numel(), parameter.ds_numel - start))  # the last ranks hold padding
        return (start, values.detach().view(-1)[:owned]) if owned else None
    share = share_of(parameter)
    first = 0 if share is None else share.start
    if hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        values = mapping.hp_fragment if key is None else state_fragment(engine, mapping, key)
        return first + mapping.lp_fragment_address.start, values.detach().view(-1)
    values = parameter.data if key is None else engine.optimizer.state[parameter][key]
    return first, values.detach().view(-1)


def state_fragment(engine, mapping, key: str) -> Tensor:
    """What the engine's own link to it should be: it is made in the first step, when only the first of the optimizer's
    groups has a state yet (deepspeed 0.19.8)."""
    optimizer, address = inner_optimizer(engine), mapping.hp_fragment_address
    (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
    return optimizer.state[flat][key].narrow(0, address.start, address.numel)


def gather(engine, parameter, key: str | None = None) -> Tensor:
    """The whole tensor on every rank, in its own shape; collective."""
    piece = fragment(engine, parameter, key)
    if not is_cut(parameter):
        return piece[1].view(parameter.shape)
    return join(piece, shape_of(parameter), engine.device)


def join(piece: tuple[int, Tensor] | None, shape: torch.Size, device: torch.device) -> Tensor:
    """Puts all ranks' slices together; every element is owned by exactly one rank. Collective."""
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=device)
    if piece is not None:
        start, values = piece
        whole[start : start + values.numel()] = values
    dist.all_reduce(whole)
    return whole.view(shape)


def write_fragment(engine, parameter, whole: Tensor, key: str | None = None) -> None:
    """Sets this rank's slice from the whole tensor."""
    flat = whole.reshape(-1)
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        start = dist.get_rank() * size
        padded = torch.zeros(size, dtype=flat.dtype)
        piece = flat[start : start + size]
        padded[: piece.numel()] = piece
        if key is None:
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, key)
        return
    piece = fragment(engine, parameter, key)
    if piece is not None:
        start, values = piece
        values.copy_(flat[start : start + values.numel()])


def inner_optimizer(engine) -> torch.optim.Optimizer:
    """The torch optimizer inside whatever DeepSpeed wraps it in."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def set_update_count(engine, count: int) -> None:
    """Sets AdamW's own counter of updates, which its bias correction uses."""
    for state in inner_optimizer(engine).state.values():
        if "step" in state:
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), count)
