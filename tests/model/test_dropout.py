"""Keyed dropout: a sample's masks follow the sample, not the batch; and they are fair."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dsvlm.model.dropout import KeyedDropout, image_keys, keyed_uniform, splitmix


def test_splitmix_is_the_published_function():
    """First outputs of splitmix64 from seed 0 (the reference C code of Vigna)."""
    golden = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    state, increment = 0, 0x9E3779B97F4A7C15
    for value in golden:
        signed = state - 2**64 if state >= 2**63 else state
        assert splitmix(torch.tensor(signed)).item() % 2**64 == value
        state = (state + increment) % 2**64


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_scale_and_independence(p):
    keys = torch.arange(8)
    torch.manual_seed(0)
    with KeyedDropout(keys, keys):
        first = F.dropout(torch.ones(8, 40, 300), p)
        second = F.dropout(torch.ones(8, 40, 300), p)
    kept = first != 0
    torch.testing.assert_close(first[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
    deviation = (p * (1 - p)) ** 0.5
    for dims, n in (((), 8 * 40 * 300), ((0, 1), 320), ((0, 2), 2400), ((1, 2), 12000)):
        rate = kept.double().mean(dims) if dims else kept.double().mean()
        assert ((rate - (1 - p)).abs() < 5 * deviation / n**0.5).all()
    # two calls, two neighbours and two samples agree as often as chance says
    chance = p**2 + (1 - p) ** 2
    neighbours = [(kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1])]
    for a, b in [(kept, second != 0), *neighbours]:
        assert abs((a == b).double().mean() - chance) < 0.01


def test_p_of_zero_and_one_and_evaluation():
    keys = torch.arange(2)
    x = torch.randn(2, 3, 4)
    with KeyedDropout(keys, keys):
        before = torch.get_rng_state()
        assert torch.equal(F.dropout(x, 0.0), x) and torch.equal(nn.Dropout(0.5).eval()(x), x)
        assert torch.equal(torch.get_rng_state(), before), "no draw where nothing is dropped"
        assert (F.dropout(x, 1.0) == 0).all()
        assert not torch.equal(nn.Dropout(0.5)(x), x)
        with pytest.raises(ValueError, match="between 0 and 1"):
            F.dropout(x, 1.5)
    assert F.dropout is torch.nn.functional.dropout and not hasattr(F.dropout, "__self__")


def test_masks_do_not_depend_on_the_padded_sizes():
    key = torch.tensor([42])
    small, large = keyed_uniform(key, 7, (1, 2, 3, 4)), keyed_uniform(torch.tensor([9, 42]), 7, (2, 5, 8, 6))
    assert torch.equal(small[0], large[1, :2, :3, :4])
    assert torch.equal(keyed_uniform(key, 7, (1, 1, 1, 4))[0, 0], keyed_uniform(key, 7, (1, 4)))


def test_flattened_rows_are_read_as_rows():
    keys = torch.tensor([5, 6])
    for shape in ((2, 3, 4), (6, 4)):
        torch.manual_seed(1)
        with KeyedDropout(keys, torch.tensor([1, 2, 3])):
            out = F.dropout(torch.ones(shape), 0.5).view(2, 3, 4)
        if shape == (2, 3, 4):
            expected = out
    assert torch.equal(out, expected)


def test_unknown_leading_dimension_is_an_error():
    with KeyedDropout(torch.arange(3), torch.arange(4)):
        with pytest.raises(ValueError, match=r"\(5, 2, 2\).*neither the 3 rows nor the 4 images"):
            F.dropout(torch.ones(5, 2, 2), 0.5)


def test_image_keys_follow_the_row():
    rows = torch.tensor([100, 200, 300])
    a = image_keys(rows, torch.tensor([0, 2, 2]))
    b = image_keys(rows.flip(0), torch.tensor([0, 0, 1, -1]))
    assert a[0] == 100 and a[1] == 300 and torch.equal(b[:2], a[1:]) and b[2] == 200 and b[3] == 0
    assert len(set(a.tolist())) == 3


def test_recomputation_draws_the_same_masks():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4), nn.Linear(6, 6), nn.Dropout(0.4)).double()
    x, keys = torch.randn(3, 5, 6, dtype=torch.float64), torch.arange(3)
    gradients = []
    for recompute in (False, True):
        layer.zero_grad()
        torch.manual_seed(3)
        with KeyedDropout(keys, keys):
            h = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
            h.square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_do_not_depend_on_the_split(tools, kind, recompute):
    """One batch of four rows, and two of two rows, with other padding, order and numbers of images."""
    lora = tools.lora(targets=(r"\.(q_proj|q|Wqkv)$",), dropout=0.1)
    config = tools.recipe(kind, dropout=0.1, lora=lora, train=("",), gradient_checkpointing=recompute)
    model = tools.build(config).double().train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at zero, where its dropout would not show
            nn.init.normal_(parameter, std=0.3)
    a, b, c, d = tools.mixed
    whole = tools.gradients(model, tools.collate([a, b, c, d], kind))
    for parts in (([a, b], [c, d]), ([c, a, d], [b]), ([c, b], [d, a]), ([a], [b], [c], [d])):
        split = tools.gradients(model, *(tools.collate(list(p), kind, extra=i + 1) for i, p in enumerate(parts)))
        tools.assert_equal(split, whole, 1e-12 if kind == "opt" else 1e-5)
    other = tools.gradients(model, tools.collate([a, b, c, d], kind), seed=1)
    assert any((whole[n] - other[n]).abs().max() > 1e-3 for n in whole)


def test_rows_of_one_image_share_the_sample_key_in_any_batch(tools):
    """As many images as rows, but not one each: a dummy image is added, or row keys would be taken for image keys."""
    model = tools.build(tools.recipe("opt", dropout=0.1)).train()
    a, b, c, _ = tools.mixed  # 1, 0 and 2 images
    batch = tools.collate([a, b, c])
    assert len(batch.image_row) == 3 and len(model._images(batch)[1]) == 4
    assert len(model._images(tools.collate([a, a]))[1]) == 2
    assert len(model.eval()._images(batch)[1]) == 3
