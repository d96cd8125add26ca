"""The language models that can decode: what to build, and how rows go through it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from types import ModuleType

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dsvlm.model.backbone import causal, seq2seq
from dsvlm.model.backbone.attention import NAME
from dsvlm.model.backbone.mpt import GitMptForCausalLM


@dataclass(frozen=True)
class Kind:
    """config, model: the Hugging Face classes; flow: module with `states` and `greedy`; attention: implementation."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    flow: ModuleType
    attention: str


KINDS = {
    "opt": Kind(OPTConfig, OPTForCausalLM, causal, NAME),
    "llama": Kind(LlamaConfig, LlamaForCausalLM, causal, NAME),
    # eager: transformers knows no other MPT; the model itself then attends by git_attention
    "mpt": Kind(MptConfig, GitMptForCausalLM, causal, "eager"),
    # eager: T5 adds a relative position bias to the scores, and its dropout must be keyed by sample
    "t5": Kind(T5Config, T5ForConditionalGeneration, seq2seq, "eager"),
}


def kind_of(name: str) -> Kind:
    """The decoder kind of that name; ValueError naming the known ones."""
    if name not in KINDS:
        raise ValueError(f"decoder.kind: {name!r} is unknown; choose one of {', '.join(KINDS)}")
    return KINDS[name]


def build_decoder(kind: Kind, settings: dict) -> PreTrainedModel:
    """A decoder with random weights; settings: arguments of its configuration, or one saved as a dict."""
    config = kind.config.from_dict(settings)
    check_decoder(config)
    config._attn_implementation = kind.attention
    decoder = kind.model(config)
    free_padding_row(decoder)
    return decoder


@torch.no_grad()
def free_padding_row(decoder: PreTrainedModel) -> None:
    """Makes the row of a padding token that also begins or ends texts one like the others.

    As torch.nn.Embedding's padding_idx it would be 0 and never train.
    """
    config, table = decoder.config, decoder.get_input_embeddings()
    if table.padding_idx is not None and table.padding_idx in (config.bos_token_id, config.eos_token_id):
        std = getattr(config, "init_std", None) or config.initializer_range  # OPT's name, and that of the others
        torch.nn.init.normal_(table.weight[table.padding_idx], std=std)
        table.padding_idx = None


def check_decoder(config: PreTrainedConfig) -> None:
    """ValueError if head counts do not divide, or for settings under which a decoder cannot be used here."""
    heads = config.num_attention_heads
    if not config.is_encoder_decoder and config.hidden_size % heads:
        raise ValueError(f"decoder: hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(f"decoder: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if getattr(config, "layerdrop", 0.0) > 0.0:
        raise ValueError(
            f"decoder: layerdrop {config.layerdrop} skips modules at random, which ZeRO-3 cannot do; set layerdrop to 0"
        )
    if getattr(config, "sliding_window", None):  # Mistral's
        raise ValueError(f"decoder: sliding_window {config.sliding_window} is not supported; take a model without one")
    if not config.return_dict:
        raise ValueError("decoder: return_dict false gives outputs without names, which are asked for; remove it")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"decoder: rope_type {rope_type!r} chooses its frequencies by the longest row of a batch, so that a "
            "sample's loss would depend on those beside it; use rope_type default, linear, yarn or llama3"
        )


def check_settings(config: type[PreTrainedConfig], settings: dict, where: str) -> None:
    """ValueError for settings that the configuration class does not accept, or does not know and would ignore."""
    known = sorted(config().to_dict())
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise ValueError(f"{where}.{key}: {config.__name__} has no such key{hint}")
    try:
        config(**settings)
    except StrictDataclassError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
