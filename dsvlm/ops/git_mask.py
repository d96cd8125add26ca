"""The GIT prefix-LM attention mask: one interval of keys per query, 8 bytes a token, never a square."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

FLEX_TILE = 128


@dataclass(frozen=True)
class GitMask:
    """Which keys each query may attend to (Wang et al. 2022, GIT: images see images, text sees images and its past).

    rows: [B or 1, S, 2] int32, the half-open interval [first, last) of keys; (0, 0) = an empty row, which is padding.
    kv_len: number of keys; with kv_len == S, a key whose own row is empty is seen by nobody, in whatever interval.
    images: image tokens that every row begins with, where that is known on the host, all of them real; packed: whether
    a row may hold several samples. Both only help to choose a backend.
    Masks are built on the device of their inputs, without waiting for it.
    """

    rows: Tensor
    kv_len: int
    images: int | None = None
    packed: bool = True

    @classmethod
    def from_lengths(
        cls,
        image_lens: Tensor | int,
        text_lens: Tensor | int,
        seq_len: int,
        *,
        padding: str = "right",
        image_slots: int | None = None,
        device: torch.device | str | None = None,
    ) -> GitMask:
        """The mask of rows that hold one sample each.

        image_lens, text_lens: [B] int64 tokens, or an int for all rows (with two ints, rows are [1, S, 2] on `device`);
        seq_len: padded length S. padding: "right" is [images | text | padding], "left" [padding | images | text].
        With image_slots, images stand in that many places at the left: [images | unused | text | padding], and "left"
        [images | unused | padding | text].
        """
        if padding not in ("right", "left"):
            raise ValueError(f"GitMask.from_lengths: padding is 'right' or 'left', found {padding!r}")
        slots = image_lens if image_slots is None else image_slots
        least = [n for n in (slots, text_lens) if isinstance(n, int)]
        known = isinstance(image_lens, int)
        if min(least, default=0) < 0 or sum(least) > seq_len or (known and not 0 <= image_lens <= slots):
            raise ValueError(
                f"GitMask.from_lengths: {image_lens} image tokens (image_slots {image_slots}) and {text_lens} text "
                f"tokens do not fit seq_len {seq_len}"
            )
        device = next((n.device for n in (image_lens, text_lens) if isinstance(n, Tensor)), device)
        images, texts = (
            n[:, None] if isinstance(n, Tensor) else torch.full((1, 1), n, device=device)
            for n in (image_lens, text_lens)
        )
        _check_lengths(images, texts, images if image_slots is None else image_slots, seq_len)
        image = torch.zeros_like(images) if padding == "right" or image_slots is not None else seq_len - images - texts
        text = image + (images if image_slots is None else image_slots) if padding == "right" else seq_len - texts
        position = torch.arange(seq_len, device=device)
        is_image = (position >= image) & (position < image + images)
        is_text = (position >= text) & (position < text + texts)
        last = torch.where(is_image, image + images, position + 1)
        rows = torch.stack(torch.broadcast_tensors(torch.where(images > 0, image, text), last), dim=-1)
        known = known and slots == image_lens and padding == "right"
        return cls(_masked(rows, is_image | is_text), seq_len, image_lens if known else None, packed=False)

    @classmethod
    def from_segments(cls, segment_ids: Tensor, is_image: Tensor, *, packed: bool = True) -> GitMask:
        """The mask of rows of segments: runs of equal ids, padding left out of account, image tokens first.

        segment_ids: [B, S] int64, -1 = padding, also between tokens of a segment; is_image: [B, S] bool;
        packed: False promises one segment per row.
        """
        shapes = segment_ids.shape, (1, *segment_ids.shape[1:])
        if segment_ids.dim() != 2 or is_image.shape not in shapes or is_image.dtype != torch.bool:
            raise ValueError(
                f"GitMask.from_segments: segment_ids {segment_ids.dtype} {tuple(segment_ids.shape)} and is_image "
                f"{is_image.dtype} {tuple(is_image.shape)}; expected integers [B, S] and torch.bool [B or 1, S]"
            )
        live = segment_ids >= 0
        start, end = _runs(segment_ids, live)
        position = torch.arange(segment_ids.shape[1], device=segment_ids.device)
        latest_image = torch.where(is_image & live, position, -1).cummax(dim=1).values
        last = torch.where(is_image, latest_image.gather(1, end - 1), position) + 1
        return cls(_masked(torch.stack((start, last), dim=-1), live), segment_ids.shape[1], packed=packed)

    @classmethod
    def from_block_ids(cls, block_sequence_ids: Tensor, attention_mask: Tensor | None = None) -> GitMask:
        """The mask that transformers calls `block_sequence_ids`: causal, and each block sees itself whole.

        block_sequence_ids: [B, S] int64, -1 = in no block; tokens of a block stand together, padding left out of
        account (GIT and PaliGemma have one block, Gemma 3 one per image); attention_mask: [B, S], 0 = padding.
        """
        length = block_sequence_ids.shape[1]
        live = torch.ones_like(block_sequence_ids) if attention_mask is None else attention_mask
        live = live.bool()
        _, end = _runs(block_sequence_ids, live)
        position = torch.arange(length, device=live.device)
        last = torch.where(block_sequence_ids >= 0, end, position + 1)
        first = live.long().argmax(dim=1, keepdim=True).expand_as(last)
        return cls(_masked(torch.stack((first, last), dim=-1), live), length, packed=False)

    @property
    def live(self) -> Tensor:
        """[B or 1, S] bool: queries that see a key; the others are padding."""
        return self.rows[..., 1] > self.rows[..., 0]

    @property
    def live_keys(self) -> Tensor:
        """[B or 1, kv_len] bool: keys that are no padding, as far as their own rows tell."""
        if self.kv_len == self.rows.shape[1]:
            return self.live
        return torch.ones(len(self.rows), self.kv_len, dtype=torch.bool, device=self.rows.device)

    def dense(self) -> Tensor:
        """[B or 1, 1, S, kv_len] bool, True = may attend: the square that the intervals stand for."""
        key = torch.arange(self.kv_len, device=self.rows.device)
        sees = (key >= self.rows[..., :1]) & (key < self.rows[..., 1:])
        return (sees & self.live_keys[:, None])[:, None]

    def as_hf(self) -> Tensor:
        """[B or 1, 1, S, 2] int32: an `attention_mask` for Hugging Face decoders, which return 4-D masks as is."""
        return self.rows[:, None]

    def position_ids(self) -> Tensor:
        """[B or 1, S] int64: place among the real tokens of the own segment; 0 on padding. Needs kv_len == S."""
        assert self.kv_len == self.rows.shape[1]
        before = self.live.long().cumsum(dim=1) - self.live.long()
        place = before - before.gather(1, self.rows[..., 0].long())
        return torch.where(self.live, place, 0)

    def tiles(self, query_tile: int, key_tile: int) -> Tensor:
        """[B or 1, query tiles, key tiles] uint8: 0 = no pair of the tile is allowed, 2 = each, 1 = some."""
        rows, length = self.rows, self.rows.shape[1]
        begin = torch.arange(0, self.kv_len, key_tile, device=rows.device)
        end = (begin + key_tile).clamp(max=self.kv_len)
        real = F.pad(self.live_keys.long().cumsum(dim=1), (1, 0))  # [B, kv_len + 1]: live keys before each
        first, last = (torch.maximum(torch.minimum(x[..., None].long(), end), begin) for x in rows.unbind(-1))
        seen = (real.gather(1, x.flatten(1)).view_as(x) for x in (first, last))
        count = -next(seen) + next(seen)  # [B, S, key tiles] keys that a query sees of a tile
        beyond = (0, 0, 0, -length % query_tile)
        some = F.pad(count > 0, beyond, value=False).unflatten(1, (-1, query_tile)).any(dim=2)
        each = F.pad(count == end - begin, beyond, value=True).unflatten(1, (-1, query_tile)).all(dim=2)
        return some.to(torch.uint8) + (some & each).to(torch.uint8)

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The mask as a function (batch, head, query, key) -> bool, FlexAttention's form."""
        first, last = (x.contiguous() for x in self.rows.unbind(-1))
        live, several = self.live_keys, len(self.rows) > 1

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = batch if several else torch.zeros_like(batch)
            return (key >= first[row, query]) & (key < last[row, query]) & live[row, key]

        return allowed

    def block_mask(self) -> BlockMask:
        """FlexAttention's mask in tiles of 128 by 128, made from the intervals."""
        tiles = self.tiles(FLEX_TILE, FLEX_TILE)
        whole = tiles == 2
        whole[:, :, -1] &= self.kv_len % FLEX_TILE == 0  # where keys end inside a tile it has to be masked
        whole[:, -1] &= self.rows.shape[1] % FLEX_TILE == 0
        partial = (tiles > 0) & ~whole
        lists = []
        for visited in (partial, whole):
            order = visited.long().argsort(dim=-1, descending=True, stable=True)
            lists += [visited.sum(dim=-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]]
        lengths = (self.rows.shape[1], self.kv_len)
        return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_TILE, mask_mod=self.mask_mod(), seq_lengths=lengths)


def _check_lengths(images: Tensor, texts: Tensor, slots: Tensor | int, seq_len: int) -> None:
    """Values on the CPU alone: a device would have to be waited for, and a compiled graph has none yet."""
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return
    misfit = (images < 0) | (texts < 0) | (images > slots) | (slots + texts > seq_len)
    if misfit.any():
        row = int(misfit.flatten().long().argmax())
        counts = (int(n.expand_as(misfit)[row]) for n in (images, texts))
        raise ValueError(
            "GitMask.from_lengths: row {}: {} image tokens and {} text tokens do not fit seq_len {}{}".format(
                row, *counts, seq_len, f" with image_slots {slots}" if isinstance(slots, int) else ""
            )
        )


def _masked(rows: Tensor, live: Tensor) -> Tensor:
    return rows.masked_fill(~live[..., None], 0).to(torch.int32)


def _runs(ids: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of equal ids around each live position begins and ends, padding left out of account; [B, S] each.

    The end is one past the last live position; values on padding are positions, but mean nothing.
    """
    length = ids.shape[1]
    position = torch.arange(length, device=ids.device)
    latest = torch.where(live, position, -1).cummax(dim=1).values  # live position at or before each
    before = F.pad(latest, (1, -1), value=-1)
    opens = live & ((before < 0) | (ids.gather(1, before.clamp(min=0)) != ids))
    start = torch.where(opens, position, 0).cummax(dim=1).values
    following = torch.where(opens, position, length).flip(1).cummin(dim=1).values.flip(1)
    beyond = F.pad(following - length, (-1, 1)) + length  # by 0: torch.compile takes a pad value for constant
    end = latest.gather(1, beyond - 1).clamp(min=0) + 1
    return start, end
