"""Rows of the decoder: one or several samples, each [own image tokens | own text], compact, padded to one width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where a batch's B samples stand in R rows of S positions.

    row, start: [B] int64, a sample's row and its first position there; first_image: [B] int64, index of its first
    image; image_lens, text_lens: [B] int64 tokens; longest: tokens of the longest sample.
    sample: [R, S] int64, the sample at each position, -1 = padding; position: [R, S] int64, counted from the start of
    that sample, 0 on padding; is_image: [R, S] bool.
    """

    row: Tensor
    start: Tensor
    first_image: Tensor
    image_lens: Tensor
    text_lens: Tensor
    longest: int
    sample: Tensor
    position: Tensor
    is_image: Tensor

    @property
    def lengths(self) -> Tensor:
        """[B] int64: tokens of each sample, images and text."""
        return self.image_lens + self.text_lens

    @property
    def slots(self) -> Tensor:
        """[B] float64: positions computed for each sample; a row counts for its samples by their lengths."""
        used = self.lengths.new_zeros(len(self.sample)).index_add(0, self.row, self.lengths)
        return self.sample.shape[1] * (self.lengths / used[self.row].double())

    @property
    def real(self) -> Tensor:
        """[R, S] bool: not padding."""
        return self.sample >= 0


def lay_out(
    image_row: Tensor,
    patches: int,
    text_lens: Tensor,
    *,
    row: Tensor | None = None,
    width: int = 0,
    flush_right: bool = False,
) -> Layout:
    """Put samples next to each other in their rows, padding at the right; with `flush_right`, rows of one, at the left.

    image_row: [N] int64, sample of each image, those of a sample consecutive, -1 = dummy; patches: tokens of an image;
    text_lens: [B] int64, at least 1; row: [B] int64 as `Batch.row`, None = one sample per row; width: S at least.
    """
    assert row is None or not flush_right
    index = torch.arange(len(text_lens), device=text_lens.device)
    row = index if row is None else row
    own = image_row == index[:, None]
    image_lens = own.sum(dim=1) * patches
    lengths = image_lens + text_lens
    before = lengths.cumsum(dim=0) - lengths
    start = before - before[torch.searchsorted(row, row)]  # minus what stands before the first sample of the row
    rows, longest_row, longest = torch.stack((row[-1] + 1, (start + lengths).max(), lengths.max())).tolist()
    width = max(width, longest_row)
    if flush_right:
        start = width - lengths

    column = torch.arange(width, device=row.device)
    sample = row.new_full((rows, width), -1)
    sample[row, start] = index
    sample = sample.cummax(dim=1).values
    last = sample.clamp(min=0)
    sample = sample.masked_fill(column >= (start + lengths)[last], -1)
    position = torch.where(sample >= 0, column - start[last], 0)
    is_image = (sample >= 0) & (position < image_lens[last])
    first_image = own.long().argmax(dim=1)
    return Layout(row, start, first_image, image_lens, text_lens, longest, sample, position, is_image)


def assemble(layout: Layout, features: Tensor, tokens: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """The rows' embeddings [R, S, D], 0 on padding.

    features: [N, patches, D]; tokens: [B, L] int64; embed: ids to embeddings, called once, on the rows' own ids, so
    that texts padded to the longest of many cost nothing but their ids.
    A dummy image is in no row, but it is in the tensor that rows are gathered from: its features have gradient 0, so
    the modules before it run, forward and backward, as with a real one.
    """
    images, patches, _ = features.shape
    sample = layout.sample.clamp(min=0)
    is_text = layout.real & ~layout.is_image
    text = embed(tokens[sample, (layout.position - layout.image_lens[sample]).clamp(min=0)])
    # where there is no image token any will do, the next one for the next position: many positions adding their
    # zeros to one token's gradient would wait for each other
    anything = torch.arange(layout.sample.numel(), device=sample.device).view_as(sample) % (images * patches)
    source = torch.where(layout.is_image, layout.first_image[sample] * patches + layout.position, anything)
    image = features.flatten(0, 1).to(text.dtype).index_select(0, source.flatten()).view_as(text)
    return torch.where(layout.is_image[..., None], image, torch.where(is_text[..., None], text, 0))
