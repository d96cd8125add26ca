"""Rows of a unit as one batch of tensors, always with the same signature: at least one row and one image."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dsvlm.data.encode import IGNORE, Encoded


@dataclass
class Batch:
    """One micro-step of one rank. B rows, N >= 1 images, L text tokens, T answer tokens (encoder-decoder).

    pixels: [N, 3, P, P] uint8; a zero image stands in when no row has one, and enters the graph times 0.
    image_row: [N] int64, row of each image, ascending; -1 = that stand-in.
    tokens: [B, L] int64, right padded; decoder: bos, prompt, target, eos; encoder-decoder: the source.
    lengths: [B] int64, tokens of each row, at least 1.
    targets: [B, L or T] int64, id to predict at this position; -100 = no loss.
    weight: [B] float32, weight of each target of the row; 0 for rows that must not teach.
    keys: [B] int64, what the row's dropout draws are keyed by.
    task, label, head: [B] int64; task index, class (-100 = none), head of the bank (-1 = none).
    decoder_tokens: [B, T] int64, decoder_lengths: [B] int64; encoder-decoder only.
    """

    pixels: Tensor
    image_row: Tensor
    tokens: Tensor
    lengths: Tensor
    targets: Tensor
    weight: Tensor
    keys: Tensor
    task: Tensor
    label: Tensor
    head: Tensor
    decoder_tokens: Tensor | None = None
    decoder_lengths: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: None if v is None else v.to(device, non_blocking=True) for k, v in moved.items()})


@dataclass(frozen=True)
class Row:
    """One sample on its way into a batch.

    image: uint8 [3, P, P], or None for a sample without image; weight: of each of its targets.
    """

    text: Encoded
    image: np.ndarray | None
    weight: float
    key: int
    task: int
    head: int = -1


def collate(rows: Sequence[Row], *, image_size: int, pad_id: int) -> Batch:
    """Pads rows to the longest. A unit without samples still sends one row of weight 0: every rank runs every module.

    rows: at least one.
    """
    assert rows, "a batch needs a row; the loader sends a masked one for a filler unit"
    with_image = [i for i, row in enumerate(rows) if row.image is not None]
    pixels = [rows[i].image for i in with_image] or [np.zeros((3, image_size, image_size), np.uint8)]
    answers = [row.text.answer for row in rows if row.text.answer is not None]
    return Batch(
        pixels=torch.from_numpy(np.stack(pixels)),
        image_row=torch.tensor(with_image or [-1]),
        tokens=pad([row.text.tokens for row in rows], pad_id),
        lengths=torch.tensor([len(row.text.tokens) for row in rows]),
        targets=pad([row.text.targets for row in rows], IGNORE),
        weight=torch.tensor([row.weight for row in rows], dtype=torch.float32),
        keys=torch.tensor([row.key for row in rows], dtype=torch.int64),
        task=torch.tensor([row.task for row in rows]),
        label=torch.tensor([IGNORE if row.text.label is None else row.text.label for row in rows]),
        head=torch.tensor([row.head for row in rows]),
        decoder_tokens=pad(answers, pad_id) if answers else None,
        decoder_lengths=torch.tensor([len(a) for a in answers]) if answers else None,
    )


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.int64)
