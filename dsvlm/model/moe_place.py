"""Where experts go: the feed-forward networks that they replace, each expert starting as a copy of the one it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from dsvlm.config_checks import picked
from dsvlm.model.moe import MoeLayer
from dsvlm.model.moe_experts import Experts

if TYPE_CHECKING:
    from dsvlm.config import MoeConfig
    from dsvlm.model.git import GitVlm


def place_experts(model: GitVlm, config: MoeConfig) -> None:
    """Replaces feed-forward networks of the model by experts, in place.

    Tower and decoder: in the blocks that config.layers picks. Connector: beside its linear layer, adding 0 at first.
    Every expert starts as the network it replaces (sparse upcycling, Komatsuzaki et al. 2022), random or pretrained.
    """
    if "vision" in config.where:
        layers = model.vision.tower.encoder.layers
        for index in picked(config.layers, len(layers), "vision"):
            layers[index].mlp = MoeLayer(f"vision{index}", config, from_clip(layers[index].mlp, config), text=False)
    if "connector" in config.where:
        linear = model.connector.linear
        experts = Experts(
            config.experts, [fresh(linear.in_features, linear.out_features)],
            torch.zeros(linear.out_features, linear.out_features),
            [torch.zeros(linear.out_features)] * 2, nn.GELU(),
        )  # fmt: skip
        model.connector.moe = MoeLayer("connector", config, experts, text=False)
    if "decoder" in config.where:
        place_in_decoder(model.decoder, config)


def place_in_decoder(decoder, config: MoeConfig) -> None:
    kind = decoder.config.model_type
    layers = {"opt": lambda: decoder.model.decoder.layers, "llama": lambda: decoder.model.layers}[kind]()
    for index in picked(config.layers, len(layers), "decoder"):
        layer, name = layers[index], f"decoder{index}"
        if kind == "llama":
            layer.mlp = MoeLayer(name, config, from_llama(layer.mlp, config), text=True)
        else:  # OPT's network is no module of its own
            layer.fc1 = MoeLayer(name, config, from_opt(layer, config), text=True)
            layer.activation_fn, layer.fc2 = nn.Identity(), nn.Identity()


def from_clip(mlp, config: MoeConfig) -> Experts:
    return from_pair(mlp.fc1, mlp.fc2, mlp.activation_fn, config)


def from_opt(layer, config: MoeConfig) -> Experts:
    return from_pair(layer.fc1, layer.fc2, layer.activation_fn, config)


def from_pair(first: nn.Linear, second: nn.Linear, act: nn.Module, config: MoeConfig) -> Experts:
    biases = [] if first.bias is None else [first.bias, second.bias]
    return Experts(config.experts, [first.weight.T], second.weight.T, biases, act)


def from_llama(mlp, config: MoeConfig) -> Experts:
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    biases = [] if mlp.gate_proj.bias is None else [layer.bias for layer in layers]
    return Experts(config.experts, [layer.weight.T for layer in layers[:2]], layers[2].weight.T, biases, mlp.act_fn)


def fresh(size: int, out: int) -> torch.Tensor:
    return torch.randn(size, out) * size**-0.5


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """All of a model's, in the order of a forward pass."""
    return [module for module in model.modules() if isinstance(module, MoeLayer)]
