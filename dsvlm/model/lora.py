"""LoRA adapters (Hu et al. 2021) by peft, on linear layers chosen by pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from dsvlm.model.freeze import matching

if TYPE_CHECKING:
    from dsvlm.config import LoraSettings


def apply_lora(model: nn.Module, settings: LoraSettings) -> None:
    """Add adapters to the decoder in place and freeze the rest of it; the other parts train.

    settings.targets: regular expressions searched in the names of the decoder's linear layers
    (`decoder.model.layers.0.self_attn.q_proj`); one that finds nothing is a ValueError.
    """
    from peft import LoraConfig, inject_adapter_in_model

    # only the decoder's: a vision tower has layers of the same names
    linear = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n.startswith("decoder.")]
    targets = {name for pattern in settings.targets for name in matching(pattern, linear, "lora", "linear layer")}
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=sorted(targets)
    )
    inject_adapter_in_model(config, model)
    del model.peft_config  # peft's note for its own saving; merged weights are what is saved here
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or not name.startswith("decoder."))  # peft froze them all


def merge_lora(model: nn.Module) -> None:
    """Fold the adapters into their layers in place; the names of parameters are then those without LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
