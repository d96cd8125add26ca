"""Rows of the decoder: [own image tokens | own text], compact, padded to the longest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Embedded rows of a batch.

    embeds: [B, S, D], 0 on padding; image_lens, text_lens: [B] int64 tokens; is_image, is_text: [B, S] bool.
    """

    embeds: Tensor
    image_lens: Tensor
    text_lens: Tensor
    is_image: Tensor
    is_text: Tensor

    @property
    def lengths(self) -> Tensor:
        """[B] int64: real tokens of each row, images and text."""
        return self.image_lens + self.text_lens

    @property
    def real(self) -> Tensor:
        """[B, S] bool: not padding."""
        return self.is_image | self.is_text


def assemble(
    features: Tensor, image_row: Tensor, text: Tensor, text_lens: Tensor, *, flush_right: bool = False
) -> Rows:
    """Put each row's images and text next to each other, padding at the right (or at the left with `flush_right`).

    features: [N, P, D]; image_row: [N] int64, images of a row consecutive, -1 = dummy; text: [B, L, D]; text_lens: [B].
    A dummy image is in no row, but it is in the tensor that rows are gathered from: its features have gradient 0, so
    the modules before it run, forward and backward, as with a real one.
    """
    (images, patches, _), (batch, length, _) = features.shape, text.shape
    row = torch.arange(batch, device=text.device)[:, None]
    own = image_row == row
    image_lens = own.sum(dim=1) * patches
    first = own.long().argmax(dim=1) * patches
    total = image_lens + text_lens
    width = int(total.max())

    position = torch.arange(width, device=text.device).expand(batch, width)
    if flush_right:
        position = position - (width - total)[:, None]
    is_image = (position >= 0) & (position < image_lens[:, None])
    is_text = (position >= image_lens[:, None]) & (position < total[:, None])
    real = is_image | is_text
    image_source = first[:, None] + position
    text_source = images * patches + row * length + position - image_lens[:, None]
    source = torch.where(is_image, image_source, text_source).masked_fill(~real, 0)

    pool = torch.cat((features.flatten(0, 1).to(text.dtype), text.flatten(0, 1)))
    embeds = pool.index_select(0, source.flatten()).unflatten(0, (batch, width))
    return Rows(torch.where(real[..., None], embeds, 0), image_lens, text_lens, is_image, is_text)
