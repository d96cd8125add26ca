"""Laying out and assembling rows against a plain loop."""

import pytest
import torch

from dsvlm.model.rows import assemble, lay_out

IMAGES = [[0, 2, 2], [-1], [1, 1, 1, -1], [0, 1, 2, 3]]


def problem(image_row):
    """Features of two tokens an image, four texts, and each sample's own embeddings."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(image_row), 2, 3, generator=generator, requires_grad=True)
    table = torch.randn(50, 3, generator=generator, requires_grad=True)
    tokens = torch.randint(50, (4, 5), generator=generator)
    lengths = torch.tensor([5, 1, 3, 2])
    samples = []
    for b in range(4):
        images = [features[i] for i, row in enumerate(image_row) if row == b]
        samples.append(torch.cat([*images, table[tokens[b, : lengths[b]]]]))
    return features, table, tokens, lengths, samples


@pytest.mark.parametrize("flush_right", [False, True])
@pytest.mark.parametrize("image_row", IMAGES)
@pytest.mark.parametrize("width", [0, 3, 16])
def test_rows_hold_their_own_images_then_their_text_then_zeros(image_row, flush_right, width):
    features, table, tokens, lengths, samples = problem(image_row)
    layout = lay_out(torch.tensor(image_row), 2, lengths, width=width, flush_right=flush_right)
    embeds = assemble(layout, features, tokens, lambda ids: table[ids])
    width = max(width, *map(len, samples))
    assert embeds.shape == (4, width, 3) and layout.longest == max(map(len, samples))
    for b, part in enumerate(samples):
        images = 2 * image_row.count(b)
        own = slice(width - len(part), width) if flush_right else slice(0, len(part))
        assert torch.equal(embeds[b, own], part)
        assert layout.image_lens[b] == images and layout.lengths[b] == len(part)
        assert layout.real[b, own].all() and layout.real[b].sum() == len(part)
        assert (embeds[b][~layout.real[b]] == 0).all() and (layout.position[b][~layout.real[b]] == 0).all()
        assert layout.is_image[b, own][:images].all() and layout.is_image[b].sum() == images
    embeds.sum().backward()
    live = torch.tensor(image_row) >= 0
    assert (features.grad[live] == 1).all() and (features.grad[~live] == 0).all()
    assert table.grad.sum() == 3 * lengths.sum()


@pytest.mark.parametrize("packed", [[0, 0, 0, 0], [0, 1, 1, 2], [0, 0, 1, 1], [0, 1, 2, 3]])
@pytest.mark.parametrize("image_row", IMAGES)
@pytest.mark.parametrize("width", [0, 32])
def test_packed_rows_hold_their_samples_in_order(image_row, packed, width):
    features, table, tokens, lengths, samples = problem(image_row)
    layout = lay_out(torch.tensor(image_row), 2, lengths, row=torch.tensor(packed), width=width)
    embeds = assemble(layout, features, tokens, lambda ids: table[ids])
    rows = [[b for b in range(4) if packed[b] == row] for row in range(packed[-1] + 1)]
    parts = [torch.cat([samples[b] for b in row]) for row in rows]
    assert embeds.shape == (len(rows), max(width, *map(len, parts)), 3)
    for row, (part, members) in enumerate(zip(parts, rows, strict=True)):
        assert torch.equal(embeds[row, : len(part)], part) and (embeds[row, len(part) :] == 0).all()
        padding = embeds.shape[1] - len(part)
        assert layout.sample[row].tolist() == [b for b in members for _ in samples[b]] + [-1] * padding
        assert layout.position[row].tolist() == [p for b in members for p in range(len(samples[b]))] + [0] * padding
        assert layout.is_image[row].sum() == sum(2 * image_row.count(b) for b in members)
        torch.testing.assert_close(layout.slots[members].sum(), torch.tensor(float(embeds.shape[1])).double())
        assert [layout.start[b] for b in members] == [sum(len(samples[c]) for c in members if c < b) for b in members]
    embeds.sum().backward()
    live = torch.tensor(image_row) >= 0
    assert (features.grad[live] == 1).all() and (features.grad[~live] == 0).all()
    assert table.grad.sum() == 3 * lengths.sum()


def test_nothing_beyond_a_text_is_looked_up():
    """Texts padded to the longest of many would otherwise be embedded whole, [B, L, D]."""
    lengths, looked_up = torch.tensor([40, 2, 2, 2]), []

    def embed(ids):
        looked_up.append(tuple(ids.shape))
        return ids[..., None].float()

    tokens = torch.arange(160).view(4, 40)
    layout = lay_out(torch.tensor([-1]), 2, lengths, row=torch.zeros(4, dtype=torch.int64))
    embeds = assemble(layout, torch.ones(1, 2, 1), tokens, embed)
    assert looked_up == [(1, 46)]
    assert embeds[0, 38:, 0].tolist() == [38, 39, 40, 41, 80, 81, 120, 121]
