"""Any Hugging Face causal language model as the decoder, under the GIT mask."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsvlm.model.rows import Rows
from dsvlm.ops import GitMask

FLUSH_RIGHT = True  # cached decoding appends at the right end, so prompts end there: one interval of keys per row


def states(decoder: PreTrainedModel, rows: Rows, batch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states before the vocabulary head.

    Returns hidden [B, S, D], the position in it of each row's first target column [B], and the last text token's
    state [B, D].
    """
    width = rows.embeds.shape[1]
    check_length(decoder, width)
    mask = GitMask.from_lengths(rows.image_lens, rows.text_lens, width)
    hidden = decoder.base_model(
        inputs_embeds=rows.embeds, attention_mask=mask.as_hf(), position_ids=mask.position_ids(), use_cache=False
    ).last_hidden_state
    last = torch.arange(len(hidden), device=hidden.device), rows.lengths - 1
    return hidden, rows.image_lens, hidden[last]


def greedy(decoder: PreTrainedModel, rows: Rows, max_new_tokens: int, eos_id: int, pad_id: int) -> Tensor:
    """Greedy continuation of rows that are flush right; [B, <= max_new_tokens] int64, pad after the first EOS."""
    width, first = rows.embeds.shape[1], rows.embeds.shape[1] - rows.lengths
    check_length(decoder, width + max_new_tokens)
    mask = GitMask.from_segments(rows.real.long() - 1, rows.is_image)
    embeds, attention, positions, cache = rows.embeds, mask.as_hf(), mask.position_ids(), None
    done = torch.zeros_like(first, dtype=torch.bool)
    tokens = []
    for step in range(max_new_tokens):
        out = decoder.base_model(
            inputs_embeds=embeds,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        token = decoder.get_output_embeddings()(out.last_hidden_state[:, -1]).argmax(dim=-1)
        tokens.append(token.masked_fill(done, pad_id))
        done = done | (token == eos_id)
        if done.all():
            break
        cache = out.past_key_values
        embeds = decoder.get_input_embeddings()(tokens[-1])[:, None]
        seen = torch.full_like(first, width + step + 1)
        attention = torch.stack((first, seen), dim=-1).to(torch.int32)[:, None, None]
        positions = (rows.lengths + step)[:, None]
    return torch.stack(tokens, dim=1)


def check_length(decoder: PreTrainedModel, width: int) -> None:
    """ValueError when rows are longer than a learned position table."""
    limit = decoder.config.max_position_embeddings
    if decoder.config.model_type == "opt" and width > limit:
        raise ValueError(
            f"decoder: a row of {width} tokens (images and text) exceeds max_position_embeddings {limit}; "
            "shorten the text, use fewer image tokens, or raise max_position_embeddings"
        )
