"""T5 as the decoder: the encoder reads [images | source text], the decoder writes the target."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsvlm.model.rows import Layout

FLUSH_RIGHT = False


def states(decoder: PreTrainedModel, embeds: Tensor, layout: Layout, batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states before the vocabulary head.

    embeds: [B, S, D]. Returns hidden [B, T, D]; the row and the position in it of each sample's first target column,
    [B] each (its own, and 0); and the encoder's state of the last source token [B, D]. Packed rows are a ValueError.
    """
    if batch.row is not None:
        raise ValueError(
            "decoder: an encoder-decoder has no mask that keeps several samples of a row apart; set the tasks' `pack` "
            "to false"
        )
    source = encode(decoder, embeds, layout)
    target = decoder.get_input_embeddings()(batch.decoder_tokens)
    position = torch.arange(target.shape[1], device=target.device)
    target = torch.where((position < batch.decoder_lengths[:, None])[..., None], target, 0)
    hidden = decoder.decoder(
        inputs_embeds=target,
        encoder_hidden_states=source,
        encoder_attention_mask=layout.real.long(),
        use_cache=False,
    ).last_hidden_state
    last = source[layout.row, layout.lengths - 1]
    return scaled(decoder, hidden), layout.row, torch.zeros_like(layout.row), last


def greedy(
    decoder: PreTrainedModel, embeds: Tensor, layout: Layout, max_new_tokens: int, eos_id: int, pad_id: int
) -> Tensor:
    """Greedy decoding from the start token; [B, <= max_new_tokens] int64, pad after the first EOS."""
    source, seen, cache = encode(decoder, embeds, layout), layout.real.long(), None
    token = torch.full_like(layout.row, decoder.config.decoder_start_token_id)
    done = torch.zeros_like(token, dtype=torch.bool)
    tokens = []
    for _ in range(max_new_tokens):
        out = decoder.decoder(
            inputs_embeds=decoder.get_input_embeddings()(token)[:, None],
            encoder_hidden_states=source,
            encoder_attention_mask=seen,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        token = decoder.get_output_embeddings()(scaled(decoder, out.last_hidden_state[:, -1])).argmax(dim=-1)
        token = token.masked_fill(done, pad_id)
        tokens.append(token)
        done = done | (token == eos_id)
        if done.all():
            break
    return torch.stack(tokens, dim=1)


def encode(decoder: PreTrainedModel, embeds: Tensor, layout: Layout) -> Tensor:
    """[B, S, D] encoder states of the rows."""
    return decoder.encoder(inputs_embeds=embeds, attention_mask=layout.real.long()).last_hidden_state


def scaled(decoder: PreTrainedModel, hidden: Tensor) -> Tensor:
    """T5 1.0 scales the states by d_model^-0.5 before its tied head; T5 1.1 does not."""
    return hidden * decoder.config.d_model**-0.5 if decoder.config.scale_decoder_outputs else hidden
