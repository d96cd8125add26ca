"""Which tokens compete for an expert's rows, and what the layers of one forward pass tell about their routing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsvlm.model.dropout import BITS, image_keys, keyed_uniform

if TYPE_CHECKING:
    from dsvlm.model.rows import Layout


@dataclass(frozen=True)
class Groups:
    """The tokens [R, S] of a layer by the group in which they compete for rows, and over which losses are taken.

    By default a group is one image, or the text of one sample: nothing about a sample then depends on which others
    share its unit, and training is the same for any cut of a window into units. Text is never limited: tokens that
    compete with later ones would know the future.
    group: [R, S] integers, uint8 where `size` <= 256, those of images first; size, images: groups, and those of images;
    budget: tokens of a group of images; valid: [R, S] bool, not padding; tokens: [G] int64, valid ones; share: [G]
    int64, how many images or samples that teach a group stands for; keys, position: of noise, as in `KeyedDropout`.
    """

    group: Tensor
    size: int
    images: int
    budget: int
    valid: Tensor
    tokens: Tensor
    share: Tensor
    keys: Tensor
    position: Tensor | None = None

    @staticmethod
    def of_text(count: int, device: torch.device) -> Groups:
        """As many tokens, all of one text: cached decoding."""
        group = torch.zeros(count, 1, dtype=torch.uint8, device=device)
        one = torch.ones(1, dtype=torch.int64, device=device)
        return Groups(group, 1, 0, 0, group == 0, one * count, one, group[:, 0].long())

    def split(self, most: int) -> list[Groups]:
        """Parts of at most `most` groups, one after the other; the decoder's rows wait for the device to be cut."""
        if self.size <= most:
            return [self]
        if self.images == self.size:
            cuts = [*range(0, self.size, most), self.size]
            return [self.some_images(slice(*pair)) for pair in pairwise(cuts)]
        group, valid = self.group.flatten().long(), self.valid.flatten()
        place = torch.arange(len(group), device=group.device)
        first = torch.full_like(self.share, len(group)).scatter_reduce(
            0, group, torch.where(valid, place, len(group)), "amin"
        )
        firsts = first[first < len(group)].sort().values[most::most]
        cuts = [0, *firsts.tolist(), len(group)]
        return [self.some_tokens(group[slice(*pair)], valid[slice(*pair)]) for pair in pairwise(cuts)]

    def some_images(self, here: slice) -> Groups:
        return replace(
            self, group=(self.group[here] - here.start).to(torch.uint8), size=here.stop - here.start,
            images=here.stop - here.start, valid=self.valid[here], tokens=self.tokens[here], share=self.share[here],
        )  # fmt: skip

    def some_tokens(self, group: Tensor, valid: Tensor) -> Groups:
        """group, valid: [n] of tokens that hold their groups whole."""
        present = torch.zeros_like(self.share, dtype=torch.bool)
        present[group[valid]] = True
        number = present.cumsum(dim=0) - 1
        size, images = present.sum().item(), present[: self.images].sum().item()
        return replace(
            self, group=torch.where(valid, number[group], 0).to(torch.uint8), size=size, images=images, valid=valid,
            tokens=self.tokens[present], share=self.share[present],
        )  # fmt: skip


class MoeContext:
    """One forward pass: the tokens of the tower and the connector (`images`), those of the decoder (`rows`), and what
    the layers tell about them.

    image_row: [N] int64, sample of each image, -1 = dummy; patches: tokens of an image; keys: [B] int64 of samples;
    teaches: [B] bool; packed: rows hold several samples; by_unit: one group for all images of the unit and one for its
    text, from which samples that do not teach keep out in training; listens: whether anybody will ask what was told.
    """

    def __init__(
        self, layout: Layout, image_row: Tensor, patches: int, keys: Tensor, teaches: Tensor, *, packed: bool = False,
        by_unit: bool = False, training: bool = False, listens: bool = False,
    ):  # fmt: skip
        live = teaches[image_row.clamp(min=0)] & (image_row >= 0)
        images = len(image_row)
        group = torch.arange(images, device=image_row.device)[:, None].expand(-1, patches)
        valid = (image_row >= 0)[:, None].expand(-1, patches)
        of_images = image_keys(keys, image_row)
        self.images = Groups(group, images, images, patches, valid, valid.sum(dim=1), live.long(), of_images)

        sample = layout.sample.clamp(min=0)
        group = torch.where(layout.is_image, layout.first_image[sample] + layout.position // patches, images + sample)
        tokens = torch.cat((self.images.tokens, layout.text_lens))
        share = torch.cat((live, teaches)).long()
        keys, position = (keys[sample], layout.position) if packed else (keys, None)
        size = images + len(teaches)
        self.rows = Groups(group, size, images, patches, layout.real, tokens, share, keys, position)
        if by_unit:
            real = teaches[sample] & layout.real if training else layout.real
            self.rows = merged(self.rows, real)
            self.images = merged(self.images, live[:, None].expand(-1, patches) if training else valid)
        self.images, self.rows = narrow(self.images), narrow(self.rows)
        self.told: list | None = [] if listens else None

    def tell(self, name: str, groups: Groups, routed) -> None:
        if self.told is not None:
            self.told.append((name, groups, routed))

    def close(self) -> list:
        """What was told; layers that are recomputed in the backward tell nothing more."""
        told, self.told = self.told, None
        return told


def merged(groups: Groups, valid: Tensor) -> Groups:
    """One group of all images, and, where there is text, one of it; valid: [R, S] bool."""
    group = (groups.group >= groups.images).long()
    kinds = range(2 if groups.size > groups.images else 1)
    tokens = torch.stack([(valid & (group == kind)).sum() for kind in kinds])
    share = torch.stack([part.sum() for part in groups.share.tensor_split([groups.images])[: len(kinds)]])
    return replace(
        groups, group=group, size=len(kinds), images=1, budget=groups.images * groups.budget, valid=valid,
        tokens=tokens, share=share,
    )  # fmt: skip


def narrow(groups: Groups) -> Groups:
    return replace(groups, group=groups.group.to(torch.uint8)) if groups.size <= 256 else groups


def keyed_normal(keys: Tensor, shape: torch.Size, position: Tensor | None = None) -> Tensor:
    """Standard normal numbers, fp64, that depend on key and place alone, as the draws of `KeyedDropout` do.

    keys, position, shape: as in `keyed_uniform`; the nonce comes from the CPU default generator.
    """
    nonce = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64).item()
    uniform = (keyed_uniform(keys, nonce, shape, position).double() + 0.5) / 2**BITS
    return torch.special.ndtri(uniform)
