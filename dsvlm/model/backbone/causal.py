"""Any Hugging Face causal language model as the decoder, under the GIT mask."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsvlm.model.rows import Layout
from dsvlm.ops import GitMask

FLUSH_RIGHT = True  # cached decoding appends at the right end, so prompts end there: one interval of keys per row


def states(decoder: PreTrainedModel, embeds: Tensor, layout: Layout, batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states before the vocabulary head; no sample of a packed row sees another.

    embeds: [R, S, D]. Returns hidden [R, S, D]; the row and the position in it of each sample's first target column,
    [B] each; and the state of its last text token [B, D].
    """
    check_length(decoder, layout.longest)
    mask = GitMask.from_segments(layout.sample, layout.is_image, packed=batch.row is not None)
    hidden = decoder.base_model(
        inputs_embeds=embeds,
        attention_mask=mask.as_hf(),
        position_ids=mask.position_ids(),
        use_cache=False,
        git_packed=mask.packed,
    ).last_hidden_state
    last = hidden[layout.row, layout.start + layout.lengths - 1]
    return hidden, layout.row, layout.start + layout.image_lens, last


def greedy(
    decoder: PreTrainedModel, embeds: Tensor, layout: Layout, max_new_tokens: int, eos_id: int, pad_id: int
) -> Tensor:
    """Greedy continuation of rows that are flush right; [B, <= max_new_tokens] int64, pad after the first EOS."""
    width, first = embeds.shape[1], layout.start
    check_length(decoder, width + max_new_tokens)
    mask = GitMask.from_segments(layout.sample, layout.is_image)
    attention, positions, cache = mask.as_hf(), mask.position_ids(), None
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
        positions = (layout.lengths + step)[:, None]
    return torch.stack(tokens, dim=1)


def check_length(decoder: PreTrainedModel, length: int) -> None:
    """ValueError when a sample is longer than a learned position table."""
    if decoder.config.model_type == "opt" and length > (limit := decoder.config.max_position_embeddings):
        raise ValueError(
            f"decoder: a sample of {length} tokens (images and text) exceeds max_position_embeddings {limit}; "
            "shorten the text, use fewer image tokens, or raise max_position_embeddings"
        )
