"""Batches of a unit: shapes, the stand-in image, packed rows and widths."""

import numpy as np
import pytest
import torch

from dsvlm.data.collate import Row, collate
from dsvlm.data.encode import Encoded


def row(tokens: int, image: bool = False) -> Row:
    text = Encoded(list(range(3, 3 + tokens)), tokens - 1, None, None, int(image))
    return Row(text, np.full((3, 4, 4), tokens, np.uint8) if image else None, 0.5, 7 * tokens, 1)


def test_plain_units_are_rows_of_their_own():
    batch = collate([row(3), row(5, image=True), row(2)], image_size=4, pad_id=0)
    assert batch.row is None and batch.width == 0
    assert batch.tokens.shape == (3, 5) and batch.lengths.tolist() == [3, 5, 2]
    assert batch.image_row.tolist() == [1] and (batch.pixels == 5).all()
    assert collate([row(3)], image_size=4, pad_id=0).image_row.tolist() == [-1]


@pytest.mark.parametrize("packed", [[0, 0, 1], (0, 1, 1), np.array([0, 0, 0])])
def test_packed_units_keep_everything_per_sample(packed):
    samples = [row(3), row(5, image=True), row(2)]
    plain = collate(samples, image_size=4, pad_id=0)
    batch = collate(samples, image_size=4, pad_id=0, width=32, packed=packed).to(torch.device("cpu"))
    assert batch.row.tolist() == list(packed) and batch.row.dtype == torch.int64 and batch.width == 32
    for name in ("pixels", "image_row", "tokens", "lengths", "targets", "weight", "keys", "task", "label", "head"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name


@pytest.mark.parametrize("packed", [[1, 1, 2], [0, 2, 2], [0, 1, 0], [0, 0]])
def test_rows_that_no_planner_makes(packed):
    with pytest.raises(AssertionError, match="packed rows"):
        collate([row(3), row(5), row(2)], image_size=4, pad_id=0, packed=packed)
