"""The GIT prefix-LM attention mask, one interval of keys per query row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GitMask:
    """Which keys each query may attend to (Wang et al. 2022, GIT: images see images, text sees images and its past).

    rows: [B, S, 2] int32, the half-open interval [first, last) of key positions; (0, 0) = an empty row (padding).
    kv_len: number of key positions; S unless keys come from a cache.
    """

    rows: Tensor
    kv_len: int

    @classmethod
    def from_lengths(cls, image_lens: Tensor, text_lens: Tensor, seq_len: int) -> GitMask:
        """The mask of rows laid out as [image tokens | text tokens | padding].

        image_lens, text_lens: [B] int64 tokens; seq_len: padded length S.
        """
        position = torch.arange(seq_len, device=image_lens.device)
        images = image_lens[:, None]
        last = torch.where(position < images, images, position + 1)
        last = torch.where(position < images + text_lens[:, None], last, 0)
        return cls(torch.stack((torch.zeros_like(last), last), dim=-1).to(torch.int32), seq_len)

    @classmethod
    def from_segments(cls, segment_ids: Tensor, is_image: Tensor) -> GitMask:
        """The mask of packed rows: a segment is a run of equal ids, its image tokens first.

        segment_ids: [B, S] int64, -1 = padding (anywhere); is_image: [B, S] bool.
        """
        length = segment_ids.shape[1]
        position = torch.arange(length, device=segment_ids.device)
        first = torch.ones_like(segment_ids, dtype=torch.bool)
        first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        start = torch.where(first, position, 0).cummax(dim=1).values
        closes = first.roll(-1, dims=1)  # a segment ends where the next starts; the last takes first[0], always true
        end = torch.where(closes, position + 1, length).flip(1).cummin(dim=1).values.flip(1)
        seen = torch.nn.functional.pad((is_image & (segment_ids >= 0)).long().cumsum(dim=1), (1, 0))
        image_end = start + seen.gather(1, end) - seen.gather(1, start)
        last = torch.where(is_image, image_end, position + 1)
        rows = torch.stack((start, last), dim=-1).masked_fill((segment_ids < 0)[..., None], 0)
        return cls(rows.to(torch.int32), length)

    def dense(self) -> Tensor:
        """[B, 1, S, kv_len] bool, True = may attend: the mask that the intervals stand for."""
        key = torch.arange(self.kv_len, device=self.rows.device)
        return ((key >= self.rows[..., :1]) & (key < self.rows[..., 1:]))[:, None]

    def as_hf(self) -> Tensor:
        """[B, 1, S, 2] int32: an `attention_mask` for Hugging Face decoders, which return 4-D masks as is."""
        return self.rows[:, None]

    def position_ids(self) -> Tensor:
        """[B, S] int64: position inside its own segment, image tokens counted; 0 on padding. Needs kv_len == S."""
        first, last = self.rows.long().unbind(-1)
        position = torch.arange(self.kv_len, device=self.rows.device)
        return torch.where(last > first, position - first, 0)
