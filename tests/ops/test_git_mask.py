"""GitMask against a plain Python oracle, the mask of the article that the project started from, and transformers'."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, GitConfig, PaliGemmaConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from dsvlm.ops import GitMask


def oracle(segments, is_image):
    """May q attend to k? One row, decided pair by pair from the rules; segments are numbered, not only runs."""
    n = len(segments)
    allowed = [[False] * n for _ in range(n)]
    for q in range(n):
        for k in range(n):
            same = segments[q] == segments[k] != -1
            allowed[q][k] = same and (is_image[k] or (not is_image[q] and k <= q))
    return allowed


layout = st.lists(  # runs of (padding before, image tokens, padding inside, text tokens)
    st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=4
)


def spread(runs, width=0):
    """Segments and is_image of a row; width: padded to."""
    segments, is_image = [], []
    for i, (before, images, inside, texts) in enumerate(runs):
        segments += [-1] * before + [i] * images + [-1] * inside + [i] * texts
        is_image += [False] * before + [True] * images + [False] * (inside + texts)
    pad = width - len(segments)
    return segments + [-1] * pad, is_image + [False] * pad


def spread_all(rows, extra=0):
    width = max(len(spread(runs)[0]) for runs in rows) + extra or 1
    return [spread(runs, width) for runs in rows]


def tensors(spreads):
    return (torch.tensor(x) for x in zip(*spreads, strict=True))


@settings(max_examples=80, deadline=None)
@given(st.lists(layout, min_size=1, max_size=3), st.integers(0, 3))
def test_from_segments_equals_oracle(rows, extra):
    spreads = spread_all(rows, extra)
    segments, is_image = tensors(spreads)
    mask = GitMask.from_segments(segments, is_image)
    assert mask.rows.dtype == torch.int32 and mask.rows.shape == (*segments.shape, 2)
    assert mask.dense()[:, 0].tolist() == [oracle(*row) for row in spreads]
    expected = [[0 if s == -1 else row[:q].count(s) for q, s in enumerate(row)] for row, _ in spreads]
    assert mask.position_ids().tolist() == expected


lengths = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(0, 3), st.sampled_from(["right", "left"]), st.sampled_from([None, 0, 2]))
def test_from_lengths_equals_oracle(lengths, extra, padding, unused):
    """Right and left padding, also between images in slots and their text."""
    images, texts = torch.tensor(lengths).unbind(1)
    slots = None if unused is None else int(images.max()) + unused
    width = int(texts.max()) + slots if slots is not None else int((images + texts).max())
    width = width + extra or 1
    spreads = []
    for m, t in lengths:
        inside = 0 if slots is None else slots - m if padding == "right" else width - t - m
        before = width - m - t if padding == "left" and slots is None else 0
        spreads.append(spread([(before, m, inside, t)], width))
    mask = GitMask.from_lengths(images, texts, width, padding=padding, image_slots=slots)
    assert mask.dense()[:, 0].tolist() == [oracle(*row) for row in spreads]
    assert mask.images is None and not mask.packed
    by_segments = GitMask.from_segments(*tensors(spreads))
    assert torch.equal(mask.position_ids(), by_segments.position_ids())
    if slots is None:
        assert torch.equal(mask.rows, by_segments.rows)
    block_ids, real = ((x == 1).long() - 1 for x in tensors([(i, s) for s, i in spreads])), by_segments.live
    assert torch.equal(GitMask.from_block_ids(next(block_ids), real).dense(), mask.dense())


@pytest.mark.parametrize("images", [0, 3])
def test_lengths_known_on_the_host_are_kept(images):
    texts = torch.tensor([2, 0, 4])
    mask = GitMask.from_lengths(images, texts, 8)
    assert mask.images == images
    assert torch.equal(mask.rows, GitMask.from_lengths(torch.full((3,), images), texts, 8).rows)
    one = GitMask.from_lengths(images, 4, 8, image_slots=images)
    assert one.images == images and torch.equal(one.rows, mask.rows[2:])
    assert GitMask.from_lengths(images, texts, 8, image_slots=images + 1).images is None
    assert GitMask.from_lengths(images, texts, 8, padding="left").images is None


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 image tokens .* 5 text tokens do not fit seq_len 8"):
        GitMask.from_lengths(4, 5, 8)
    with pytest.raises(ValueError, match="image_slots 3.* do not fit"):
        GitMask.from_lengths(4, 2, 8, image_slots=3)
    for images, texts in ((-1, 2), (1, -2)):
        with pytest.raises(ValueError, match="do not fit seq_len 8"):
            GitMask.from_lengths(images, texts, 8)
    cases = ([1, 4], [7, 5], None), ([1, -1], [2, 2], 1), ([1, 1], [1, -1], 1), ([1, 4], [2, 2], 3)
    for images, texts, slots in cases:
        with pytest.raises(ValueError, match="row 1: .* do not fit seq_len 8"):
            GitMask.from_lengths(torch.tensor(images), torch.tensor(texts), 8, image_slots=slots)
    with pytest.raises(ValueError, match="found 'both'"):
        GitMask.from_lengths(4, 2, 8, padding="both")


def test_segments_that_do_not_fit_are_refused():
    segments = torch.zeros(2, 4).long()
    for images in (torch.zeros(3, 4).bool(), torch.zeros(2, 4), torch.zeros(4).bool()):
        with pytest.raises(ValueError, match=r"from_segments.*\(2, 4\) and is_image"):
            GitMask.from_segments(segments, images)


@pytest.mark.parametrize("images,texts", [(3, 4), (0, 4), (1, 1), (5, 0)])
def test_equals_the_mask_of_the_article(images, texts, article_mask):
    mask = GitMask.from_lengths(torch.tensor([images]), torch.tensor([texts]), images + texts)
    expected = article_mask(torch.rand(1, texts, 8), torch.rand(1, images, 8)) == 0
    assert torch.equal(mask.dense(), expected)


def test_as_hf_is_one_interval_per_query():
    mask = GitMask.from_lengths(torch.tensor([2, 0]), torch.tensor([1, 3]), 4)
    assert mask.as_hf().shape == (2, 1, 4, 2) and mask.as_hf().dtype == torch.int32
    assert mask.as_hf()[:, 0].tolist() == [[[0, 2], [0, 2], [0, 3], [0, 0]], [[0, 1], [0, 2], [0, 3], [0, 0]]]


@pytest.mark.parametrize("family", ["git", "paligemma", "gemma3"])
@pytest.mark.parametrize("side", ["right", "left", None])
def test_block_ids_mean_what_transformers_means(family, side):
    """On rows that are no padding; where nothing is seen, transformers has rows too."""
    token_type = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 1, 0]])
    if family != "gemma3":
        token_type = token_type.sort(dim=1, descending=True).values  # one block, at the beginning
    real = torch.ones_like(token_type)
    if side:
        pads = torch.tensor([[0, 0, 0], [1, 1, 1]])
        token_type = torch.cat((0 * pads, token_type) if side == "left" else (token_type, 0 * pads), dim=1)
        real = torch.cat((pads, real) if side == "left" else (real, pads), dim=1)
    config = {"git": GitConfig, "paligemma": PaliGemmaConfig, "gemma3": Gemma3TextConfig}[family]()
    config = config.get_text_config()
    block_ids = {
        "git": torch.where(token_type == 1, 0, -1),
        "paligemma": torch.where((token_type == 1) | (real == 0), 0, -1),  # its padding has the type of the prefix
        "gemma3": get_block_sequence_ids_for_mask(token_type),
    }[family]
    config._attn_implementation = "sdpa"
    embeds = torch.empty(*token_type.shape, 1)
    theirs = create_causal_mask(config, embeds, real, None, block_sequence_ids=block_ids)
    ours = GitMask.from_block_ids(block_ids, real if side else None).dense()
    live = real.bool()[:, None, :, None].expand_as(ours)
    assert torch.equal(ours[live], theirs[live]) and not ours[~live].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(layout, min_size=1, max_size=3), st.integers(0, 3), st.sampled_from((1, 2, 4)), st.sampled_from((1, 3)))
def test_tiles_are_exact(rows, extra, query_tile, key_tile):
    segments, is_image = tensors(spread_all(rows, extra))
    mask = GitMask.from_segments(segments, is_image)
    found, dense = mask.tiles(query_tile, key_tile), mask.dense()[:, 0]
    for row in range(len(dense)):
        for i in range(found.shape[1]):
            for j in range(found.shape[2]):
                tile = dense[row, i * query_tile : (i + 1) * query_tile, j * key_tile : (j + 1) * key_tile]
                assert found[row, i, j] == int(tile.any()) + int(tile.all())


def test_tiles_of_cached_keys():
    rows = torch.tensor([[[0, 5]], [[2, 5]], [[0, 0]]], dtype=torch.int32)
    assert GitMask(rows, 5).tiles(4, 2).tolist() == [[[2, 2, 2]], [[0, 2, 2]], [[0, 0, 0]]]


@pytest.mark.parametrize("batch", [1, 3])
def test_block_mask_equals_the_one_made_from_the_square(batch):
    from torch.nn.attention.flex_attention import create_block_mask

    segments = torch.arange(300).div(90, rounding_mode="floor").repeat(batch, 1)
    segments[:, 40:45], segments[-1, 200:] = -1, -1
    is_image = torch.arange(300).remainder(90).lt(60).expand(batch, -1)
    mask = GitMask.from_segments(segments, is_image)
    wanted = create_block_mask(mask.mask_mod(), batch, None, 300, 300, device="cpu")
    found = mask.block_mask()
    assert torch.equal(found.to_dense(), wanted.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def build_all(segments, is_image, lengths):
    masks = [
        GitMask.from_segments(segments, is_image), GitMask.from_lengths(lengths, lengths, 12, image_slots=5),
        GitMask.from_lengths(3, lengths, 12, padding="left"), GitMask.from_block_ids(segments, segments >= 0),
        GitMask.from_lengths(3, 4, 12, device=segments.device),
    ]  # fmt: skip
    return [x for m in masks for x in (m.rows, m.dense(), m.position_ids(), m.tiles(4, 4), m.block_mask().kv_indices)]


def test_nothing_waits_for_the_device():
    """Meta tensors have no values: reading one is an error. (Lengths on the CPU are looked at.)"""
    with torch.device("meta"):
        built = build_all(torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 12).bool(), torch.ones(2).long())
        assert built[0].shape == (2, 12, 2)
        with pytest.raises(RuntimeError, match="meta tensors"):
            built[0].sum().item()


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu():
    inputs = [torch.zeros(2, 12).long().cuda(), torch.zeros(2, 12).bool().cuda(), torch.ones(2).long().cuda()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        build_all(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
