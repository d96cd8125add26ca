"""Expert parallelism in a run: experts dealt to the ranks, and what DeepSpeed is told about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsvlm.config import Recipe

if TYPE_CHECKING:
    from dsvlm.model.git import GitVlm


def share_experts(model: GitVlm, recipe: Recipe) -> None:
    """Leaves each rank its share of the experts of a whole model, when the recipe says so.

    Raises ValueError when the experts cannot be dealt to the ranks evenly.
    """
    import torch.distributed as dist

    if not recipe.train.expert_parallel or dist.get_world_size() == 1:
        return
    from dsvlm.model.moe import ALIGN, most_groups
    from dsvlm.model.moe_parallel import ExpertParallel
    from dsvlm.model.moe_place import moe_layers
    from dsvlm.ops import expert_capacity

    moe, train, tokens = recipe.model.moe, recipe.train, model.vision.tokens
    images = 1 + (train.micro_tokens // tokens if train.micro_tokens else train.micro_batch)  # with a stand-in
    room = expert_capacity(tokens, moe.experts, moe.k, moe.capacity_factor)
    calls = images // most_groups(moe.experts)  # of routing, beside one; each aligns its own rows
    rows = -(-images * room // ALIGN) * ALIGN + calls * ALIGN
    parallel = ExpertParallel(dist.group.WORLD, moe.experts, rows)
    for layer in moe_layers(model):
        layer.parallel = parallel
        parallel.deal(layer.experts)
    tell_deepspeed(model, moe.experts, parallel.ranks)


def tell_deepspeed(model: GitVlm, experts: int, ranks: int) -> None:
    """Marks the shared parameters, and adds a module without parameters by which DeepSpeed knows that there are some.

    DeepSpeed then reduces, partitions and broadcasts them over a group of this rank alone, divides their gradients by
    the number of all ranks as it does others, and adds their squares over all ranks to the norm.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups
    from torch import nn

    name = f"ep_size_{ranks}"  # as DeepSpeed calls the group

    class Dealt(nn.Module):
        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            if name not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(ranks)

    class Trained(Dealt, MoE):
        """An MoE in name only: with one in the model, DeepSpeed looks for groups of experts in the optimizer."""

        def __init__(self):
            nn.Module.__init__(self)
            self.num_experts = experts

    trained = False
    for parameter in shared_parameters(model):
        parameter.allreduce, parameter.group_name = False, name
        trained |= parameter.requires_grad
    model.dealt_experts = Trained() if trained else Dealt()


def shared_parameters(model: GitVlm) -> list:
    from dsvlm.model.moe_parallel import share_of

    return [parameter for parameter in model.parameters() if share_of(parameter) is not None]
