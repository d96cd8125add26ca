"""Samples of a unit as one batch of tensors, always with the same signature: at least one sample and one image."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsvlm.data.encode import IGNORE, Encoded


@dataclass
class Batch:
    """One micro-step of one rank. B samples, N >= 1 images, L text tokens, T answer tokens (encoder-decoder).

    pixels: [N, 3, P, P] uint8; a zero image stands in when no sample has one, and enters the graph times 0.
    image_row: [N] int64, sample of each image, ascending; -1 = that stand-in.
    tokens: [B, L] int64, right padded; decoder: bos, prompt, target, eos; encoder-decoder: the source.
    lengths: [B] int64, text tokens of each sample, at least 1.
    targets: [B, L or T] int64, id to predict at this position; -100 = no loss.
    weight: [B] float32, weight of each target of the sample; 0 for samples that must not teach.
    keys: [B] int64, what the sample's dropout draws are keyed by.
    task, label, head: [B] int64; task index, class (-100 = none), head of the bank (-1 = none).
    decoder_tokens: [B, T] int64, decoder_lengths: [B] int64; encoder-decoder only.
    row: [B] int64 ascending from 0 without gaps, the packed row that the model puts each sample into, samples of a row
    next to each other in their order; None = every sample is a row of its own.
    width: positions (images and text) that rows are padded to at least; 0 = the longest row's.
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
    row: Tensor | None = None
    width: int = 0

    def to(self, device: torch.device) -> "Batch":
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in held.items() if isinstance(v, Tensor)}
        return Batch(**held | moved)


class Row(NamedTuple):
    """One sample on its way into a batch.

    image: uint8 [3, P, P], or None for a sample without image; weight: of each of its targets.
    """

    text: Encoded
    image: np.ndarray | None
    weight: float
    key: int
    task: int
    head: int = -1


def collate(
    rows: Sequence[Row], *, image_size: int, pad_id: int, width: int = 0, packed: Sequence[int] | None = None,
    pixels: np.ndarray | None = None,
) -> Batch:  # fmt: skip
    """Pads texts to the longest. A unit without samples still sends one of weight 0: every rank runs every module.

    rows: at least one; width, packed: the batch's `width` and `row`; pixels: the rows' images, if they already are one
    array, which the batch then shows without a copy.
    """
    assert rows, "a batch needs a row; the loader sends a masked one for a filler unit"
    with_image = [i for i, row in enumerate(rows) if row.image is not None]
    if pixels is None:
        pixels = np.stack([rows[i].image for i in with_image] or [np.zeros((3, image_size, image_size), np.uint8)])
    texts, _, weights, keys, tasks, heads = zip(*rows, strict=True)
    made = arrange(texts, with_image, keys, tasks, heads, pad_id, packed)
    return complete(made, pixels, weights, width)


def arrange(
    texts: Sequence[Encoded], with_image: Sequence[int], keys: Sequence[int], tasks: Sequence[int],
    heads: Sequence[int], pad_id: int, packed: Sequence[int] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The fields of a batch that do not wait for its images. with_image: the samples that have one, ascending."""
    if packed is not None:
        steps = np.diff(np.asarray(packed, np.int64), prepend=-1)
        assert len(steps) == len(texts) and steps[0] == 1 and np.isin(steps, (0, 1)).all(), f"packed rows {packed}"
    made = {
        "image_row": np.array(with_image or [-1], np.int64),
        "keys": np.array(keys, np.int64),
        "task": np.array(tasks, np.int64),
        "label": np.array([IGNORE if text.label is None else text.label for text in texts], np.int64),
        "head": np.array(heads, np.int64),
        **arranged(texts, pad_id),
    }
    if packed is not None:
        made["row"] = np.array(packed, np.int64)
    # Torch shows arrays of numpy, which makes small ones twice as fast.
    return {name: torch.from_numpy(array) for name, array in made.items()}


def complete(made: dict[str, Tensor], pixels: np.ndarray, weights: Sequence[float], width: int) -> Batch:
    """A batch of what was arranged and what its images decide; weights: of each sample."""
    weight = torch.from_numpy(np.array(weights, np.float32))
    return Batch(pixels=torch.from_numpy(pixels), weight=weight, width=int(width), **made)


def arranged(texts: Sequence[Encoded], pad_id: int) -> dict[str, np.ndarray]:
    """The batch's tokens, lengths and targets, and what the decoder of an encoder-decoder reads."""
    prompts = np.array([text.prompt for text in texts], np.int64)
    if (start := texts[0].start) is None:
        tokens, sizes = pad([text.ids for text in texts], pad_id)
        targets = np.full_like(tokens, IGNORE)
        place = np.arange(1, tokens.shape[1])
        predicted = (place >= prompts[:, None]) & (place < sizes[:, None])
        np.copyto(targets[:, :-1], tokens[:, 1:], where=predicted)
        for row, text in enumerate(texts):
            for first, end in text.silent:
                targets[row, first - 1 : end - 1] = IGNORE
        return {"tokens": tokens, "lengths": sizes, "targets": targets}
    tokens, _ = pad([text.ids[: text.prompt] for text in texts], pad_id)
    targets, sizes = pad([text.ids[text.prompt :] for text in texts], IGNORE)
    read = np.full_like(targets, pad_id)
    read[:, 0] = start
    np.copyto(read[:, 1:], targets[:, :-1], where=targets[:, 1:] != IGNORE)
    lengths = {"lengths": prompts, "decoder_lengths": np.maximum(sizes, 1)}
    return {"tokens": tokens, "targets": targets, "decoder_tokens": read, **lengths}


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [rows, longest or 1], int64 [rows]): rows filled up on the right with `value`, and their lengths."""
    lengths = [len(row) for row in rows]
    sizes, padded = np.array(lengths, np.int64), np.full((len(rows), max(1, *lengths)), value, np.int64)
    padded[np.arange(padded.shape[1]) < sizes[:, None]] = np.concatenate(rows)
    return padded, sizes
