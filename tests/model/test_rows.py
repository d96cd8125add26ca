"""Assembling rows against a plain loop."""

import pytest
import torch

from dsvlm.model.rows import assemble


@pytest.mark.parametrize("flush_right", [False, True])
@pytest.mark.parametrize("image_row", [[0, 2, 2], [-1], [1, 1, 1, -1], [0, 1, 2, 3]])
def test_rows_hold_their_own_images_then_their_text_then_zeros(image_row, flush_right):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(image_row), 2, 3, generator=generator, requires_grad=True)
    text = torch.randn(4, 5, 3, generator=generator, requires_grad=True)
    lengths = torch.tensor([5, 1, 3, 2])
    rows = assemble(features, torch.tensor(image_row), text, lengths, flush_right=flush_right)
    parts = []
    for b in range(4):
        images = [features[i] for i, row in enumerate(image_row) if row == b]
        parts.append(torch.cat([*images, text[b, : lengths[b]]]))
        assert rows.image_lens[b] == 2 * len(images) and rows.lengths[b] == len(parts[b])
    width = max(map(len, parts))
    assert rows.embeds.shape == (4, width, 3)
    for b, part in enumerate(parts):
        own = slice(width - len(part), width) if flush_right else slice(0, len(part))
        assert torch.equal(rows.embeds[b, own], part)
        assert rows.real[b, own].all() and rows.real[b].sum() == len(part)
        assert (rows.embeds[b][~rows.real[b]] == 0).all()
        assert rows.is_image[b, own][: rows.image_lens[b]].all() and rows.is_image[b].sum() == rows.image_lens[b]
    rows.embeds.sum().backward()
    live = torch.tensor(image_row) >= 0
    assert (features.grad[live] == 1).all() and (features.grad[~live] == 0).all()
    assert (text.grad.sum((1, 2)) == 3 * lengths).all()
