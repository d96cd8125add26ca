"""The fused operations and their pure PyTorch references."""

from dsvlm.ops.git_attention import git_attention
from dsvlm.ops.git_mask import GitMask
from dsvlm.ops.moe_capacity import expert_capacity, most_pools
from dsvlm.ops.moe_losses import LimoeAux, limoe_aux
from dsvlm.ops.moe_routing import Routing, moe_combine, moe_permute, moe_route, rows_bound

__all__ = [
    "GitMask", "LimoeAux", "Routing", "expert_capacity", "git_attention", "limoe_aux", "moe_combine", "moe_permute",
    "moe_route", "most_pools", "rows_bound",
]  # fmt: skip
