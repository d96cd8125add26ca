"""GitMask against a plain Python oracle, and against the mask of the article that the project started from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvlm.ops import GitMask


def oracle(segments, is_image):
    """May q attend to k? One row, decided pair by pair from the rules."""
    n = len(segments)
    allowed = [[False] * n for _ in range(n)]
    for q in range(n):
        for k in range(n):
            same = segments[q] == segments[k] != -1
            allowed[q][k] = same and (is_image[k] or (not is_image[q] and k <= q))
    return allowed


layout = st.lists(  # runs of (padding before, image tokens, text tokens)
    st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4
)


def spread(runs, width):
    segments, is_image = [], []
    for i, (pads, images, texts) in enumerate(runs):
        segments += [-1] * pads + [i] * (images + texts)
        is_image += [False] * pads + [True] * images + [False] * texts
    return segments + [-1] * (width - len(segments)), is_image + [False] * (width - len(is_image))


@settings(max_examples=80, deadline=None)
@given(st.lists(layout, min_size=1, max_size=3), st.integers(0, 3))
def test_from_segments_equals_oracle(rows, extra):
    width = max(sum(map(sum, runs)) for runs in rows) + extra or 1
    spreads = [spread(runs, width) for runs in rows]
    segments, is_image = (torch.tensor(x) for x in zip(*spreads, strict=True))
    mask = GitMask.from_segments(segments, is_image)
    assert mask.rows.dtype == torch.int32 and mask.rows.shape == (len(rows), width, 2)
    assert mask.dense()[:, 0].tolist() == [oracle(*row) for row in spreads]
    expected = []
    for row, _ in spreads:
        expected.append([0 if s == -1 else q - row.index(s) for q, s in enumerate(row)])
    assert mask.position_ids().tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=4), st.integers(0, 3))
def test_from_lengths_equals_from_segments(lengths, extra):
    images, texts = torch.tensor(lengths).unbind(1)
    width = int((images + texts).max()) + extra or 1
    spreads = [spread([(0, m, t)], width) for m, t in lengths]
    segments, is_image = (torch.tensor(x) for x in zip(*spreads, strict=True))
    mask = GitMask.from_lengths(images, texts, width)
    assert torch.equal(mask.rows, GitMask.from_segments(segments, is_image).rows)


@pytest.mark.parametrize("images,texts", [(3, 4), (0, 4), (1, 1), (5, 0)])
def test_equals_the_mask_of_the_article(images, texts, article_mask):
    mask = GitMask.from_lengths(torch.tensor([images]), torch.tensor([texts]), images + texts)
    expected = article_mask(torch.rand(1, texts, 8), torch.rand(1, images, 8)) == 0
    assert torch.equal(mask.dense(), expected)


def test_as_hf_is_one_interval_per_query():
    mask = GitMask.from_lengths(torch.tensor([2, 0]), torch.tensor([1, 3]), 4)
    assert mask.as_hf().shape == (2, 1, 4, 2) and mask.as_hf().dtype == torch.int32
    assert mask.as_hf()[:, 0].tolist() == [[[0, 2], [0, 2], [0, 3], [0, 0]], [[0, 1], [0, 2], [0, 3], [0, 0]]]
