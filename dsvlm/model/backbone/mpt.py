"""MPT under the GIT mask: its attention knows neither the attention interface nor a mask of intervals."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import MptConfig, MptForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.mpt.modeling_mpt import MptAttention, MptModel, build_mpt_alibi_tensor

from dsvlm.model.backbone.attention import NAME, attention


class GitMptForCausalLM(MptForCausalLM):
    """`MptForCausalLM` whose layers attend by `git_attention`; the same weights by the same names."""

    def __init__(self, config: MptConfig):
        super().__init__(config)
        use_git_attention(self)


def use_git_attention(model: MptForCausalLM) -> None:
    """Makes an MPT model, in place and with its own weights, attend by `git_attention`; ALiBi is computed in it.

    Its `attention_mask` may then be `GitMask.as_hf()`, a dense mask (bool: True = may attend, which MPT itself reads
    the other way round), [B, S], or None.
    """
    model.config._attn_implementation = NAME  # what create_causal_mask makes of a mask that is none of intervals
    model.transformer.__class__ = GitMptModel
    for block in model.transformer.blocks:
        block.attn.__class__ = GitMptAttention


class GitMptModel(MptModel):
    """The body of MPT, handing its mask to the layers as it is, and the slopes of ALiBi instead of a square of them."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, S] or inputs_embeds [B, S, D]; position_ids are ignored: ALiBi knows distances only."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("MPT: expected one of input_ids and inputs_embeds, found both or neither")
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        mask = create_causal_mask(self.config, hidden, attention_mask, past_key_values)
        slopes = alibi_slopes(self.num_heads, hidden.device)
        states = ()
        for block in self.blocks:
            states += (hidden,) if wanted else ()
            hidden = block(hidden, position_bias=slopes, attention_mask=mask, layer_past=past_key_values)[0]
        hidden = self.norm_f(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=past_key_values,
            hidden_states=(*states, hidden) if wanted else None,
        )  # fmt: skip


class GitMptAttention(MptAttention):
    """MPT's attention; position_bias: [H] slopes, attention_mask: as `backbone.attention.attention` takes it."""

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = mixed.unflatten(-1, (3, self.n_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, _ = attention(
            self, query, key, value, attention_mask, dropout=self.attn_dropout_p if self.training else 0.0,
            scaling=self.softmax_scale, alibi_slopes=position_bias,
        )  # fmt: skip
        return self.out_proj(out.flatten(2)), None


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """[H] fp32: how much a head's scores fall per position of distance, as MPT has them."""
    return -build_mpt_alibi_tensor(heads, 2, device=device)[:, 0, 0]
