"""Batches of a unit: shapes, the stand-in image, packed rows and widths."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsvlm.data.collate import Row, collate
from dsvlm.data.encode import IGNORE, Encoded
from dsvlm.data.jobs import pack, unpack
from dsvlm.data.reading import Text


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


IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6)
PARTS = st.lists(st.tuples(IDS, IDS, st.none() | st.integers(0, 9), st.integers(0, 1)), min_size=1, max_size=5)


def texts_of(parts, start) -> list[Encoded]:
    return [Encoded([7, *prompt, *target], 1 + len(prompt), start, *rest) for prompt, target, *rest in parts]


def test_later_questions_of_a_conversation_are_not_predicted():
    talk = Encoded([1, 3, 4, 2, 5, 6, 7, 2, 8, 9, 2], 2, None, None, 0, ((4, 6), (8, 9)))
    batch = collate([row(3), Row(talk, None, 1.0, 0, 0)], image_size=4, pad_id=0)
    assert talk.targets == [IGNORE, 4, 2, IGNORE, IGNORE, 7, 2, IGNORE, 9, 2, IGNORE] and talk.count == 6
    assert batch.targets.tolist() == filled([row(3).text.targets, talk.targets], IGNORE)
    found, = unpack(*pack([Text(talk, 5)]))
    assert found.row._replace(ids=found.row.ids.tolist()) == talk


def filled(rows, value) -> list[list[int]]:
    return [[*row, *[value] * (max(map(len, rows)) - len(row))] for row in rows]


@given(parts=PARTS, start=st.none() | st.just(5))
def test_a_batch_is_its_rows_filled_up(parts, start):
    texts = texts_of(parts, start)
    batch = collate([Row(text, None, 0.5, -(2**63), 3, 1) for text in texts], image_size=4, pad_id=9)
    assert batch.tokens.tolist() == filled([text.tokens for text in texts], 9)
    assert batch.targets.tolist() == filled([text.targets for text in texts], IGNORE)
    assert batch.lengths.tolist() == [len(text.tokens) for text in texts]
    assert batch.label.tolist() == [IGNORE if text.label is None else text.label for text in texts]
    assert sum(text.count for text in texts) == ((batch.targets != IGNORE).sum() + (batch.label != IGNORE).sum()).item()
    if start is None:
        assert batch.decoder_tokens is None and batch.targets.shape == batch.tokens.shape
    else:
        assert batch.decoder_tokens.tolist() == filled([text.answer for text in texts], 9)
        assert batch.decoder_lengths.tolist() == [len(text.answer) for text in texts]
    others = [v for k, v in vars(batch).items() if torch.is_tensor(v) and k not in ("pixels", "weight")]
    assert {tensor.dtype for tensor in others} == {torch.int64} and batch.weight.dtype == torch.float32
    assert batch.keys.unique().tolist() == [-(2**63)]


@given(parts=PARTS, start=st.none() | st.just(5), bad=st.sets(st.integers(0, 4)))
def test_texts_of_another_process_are_the_same(parts, start, bad):
    texts = [
        Text(None, place, f"reason {place}") if place in bad else Text(row, 2**32 - 1)
        for place, row in enumerate(texts_of(parts, start))
    ]
    found = unpack(*pack(texts))
    assert [text._replace(row=text.row and text.row._replace(ids=list(text.row.ids))) for text in found] == texts
    here, there = ([Row(t.row, None, 1.0, 0, 0) for t in some if t.row] for some in (texts, found))
    if here:
        ours, theirs = (vars(collate(rows, image_size=4, pad_id=9)) for rows in (here, there))
        assert all(torch.equal(v, theirs[k]) if torch.is_tensor(v) else v == theirs[k] for k, v in ours.items())
