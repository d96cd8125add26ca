"""The vision encoder: uint8 pixels to one feature per patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from dsvlm.config_checks import tokens_of_image
from dsvlm.model.backbone.attention import NAME


class VisionEncoder(nn.Module):
    """A CLIP vision tower whose tokens, CLS included, leave before the post-layernorm, as in GIT.

    tower: a CLIPVisionModel; mean, std: per colour channel, of pixels scaled to [0, 1].
    """

    def __init__(self, tower: CLIPVisionModel, mean: list[float], std: list[float]):
        super().__init__()
        tower.post_layernorm = nn.Identity()  # feeds only the pooled output, which has no use here: never a gradient
        # the dropout inside torch's attention cannot be keyed by sample, that of ours can
        tower.config._attn_implementation = NAME if tower.config.attention_dropout > 0 else "sdpa"
        self.tower = tower
        self.mean, self.std = mean, std

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return tokens_of_image(self.tower.config.image_size, self.tower.config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: uint8 [N, 3, P, P]; returns features [N, tokens, hidden_size] in the tower's dtype."""
        # a tower where nothing trains keeps no activations
        trains = any(parameter.requires_grad for parameter in self.tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            scaled = pixels.to(self.tower.dtype) / 255
            channels = zip(scaled.unbind(1), self.mean, self.std, strict=True)
            normalised = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
            return self.tower(pixel_values=normalised).last_hidden_state


def build_tower(settings: dict) -> CLIPVisionModel:
    """A tower with random weights from CLIPVisionConfig arguments; sizes that do not fit are a ValueError."""
    config = CLIPVisionConfig(**settings)
    check_tower(config)
    return CLIPVisionModel(config)


def check_tower(config: CLIPVisionConfig) -> None:
    """ValueError for sizes that do not fit together, or that are none of images in colour."""
    if config.image_size % config.patch_size:
        raise ValueError(f"vision: image_size {config.image_size} is not a multiple of patch_size {config.patch_size}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"vision: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )
    if config.num_channels != 3:
        raise ValueError(f"vision: num_channels {config.num_channels}, but images have 3, red, green and blue; use 3")
    if not config.return_dict:
        raise ValueError("vision: return_dict false gives outputs without names, which are asked for; remove it")
