"""Packed rows: several samples in one row compute what they compute in rows of their own, draw for draw."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dsvlm.model.dropout import KeyedDropout
from dsvlm.model.git import GitVlm

# of the largest gradient; RMSNorm and rotary embeddings of LLaMA round to fp32 inside, also in an fp64 model
TOLERANCE = {"opt": 1e-12, "llama": 1e-7}
PACKINGS = ([0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 2], [0, 1, 2, 3, 4])


@pytest.fixture(scope="module")
def samples(tools):
    """Text between images, no image at either end, two images, a head's, and one that must not teach."""
    masked = replace(tools.sample(6, 0, 1, 3), weight=0.0)
    return [*tools.mixed[1:], tools.mixed[0], masked]


@pytest.fixture(scope="module")
def models(tools):
    """`models(kind, **settings)`: a double model in training, built once, LoRA's second factors not zero."""
    built = {}

    def model(kind="opt", dropout=0.0, lora=False, recompute=False) -> GitVlm:
        key = kind, dropout, lora, recompute
        if key not in built:
            adapters = tools.lora(targets=(r"\.(q_proj|fc1|gate_proj)$",), dropout=dropout) if lora else None
            config = tools.recipe(kind, dropout=dropout, lora=adapters, train=("",), gradient_checkpointing=recompute)
            built[key] = tools.build(config).double().train()
            for name, parameter in built[key].named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.3)
        return built[key]

    return model


def run(tools, model, batch):
    """Gradients, loss and what is told of each sample, with the draws of a fixed seed."""
    gradients = tools.gradients(model, batch)
    torch.manual_seed(0)
    with model.keyed_dropout(batch):
        out = model(batch)
    return gradients, out


def assert_same(found, wanted, tolerance):
    (gradients, out), (wanted_gradients, wanted_out) = found, wanted
    scale = max(float(g.abs().max()) for g in wanted_gradients.values())
    assert gradients.keys() == wanted_gradients.keys() and scale > 0
    for name, gradient in wanted_gradients.items():
        error = float((gradients[name] - gradient).abs().max()) / scale
        assert error <= tolerance, f"{name}: {error:.1e} of the largest gradient"
    assert torch.equal(out["positions"], wanted_out["positions"])
    for name in ("loss_sum", "nll"):
        torch.testing.assert_close(out[name], wanted_out[name], rtol=100 * tolerance, atol=tolerance)
    assert torch.equal(out["count"], wanted_out["count"]) and torch.equal(out["correct"], wanted_out["correct"])


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.1}, {"dropout": 0.1, "lora": True, "recompute": True}])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_packed_equals_unpacked(tools, models, samples, kind, settings):
    model = models(kind, **settings)
    wanted = run(tools, model, tools.collate(samples))
    for packed in PACKINGS:
        assert_same(run(tools, model, tools.collate(samples, packed=packed)), wanted, TOLERANCE[kind])
    assert_same(run(tools, model, tools.collate(samples, width=48)), wanted, TOLERANCE[kind])
    padded = tools.collate(samples, extra=2, packed=PACKINGS[1], width=64)
    assert_same(run(tools, model, padded), wanted, TOLERANCE[kind])
    if settings:
        plain = run(tools, models(kind, lora=settings.get("lora", False)), tools.collate(samples))
        assert abs(plain[1]["loss_sum"] - wanted[1]["loss_sum"]) > 1e-3, "dropout did nothing"


drawn = st.lists(  # images, prompt, target, head, whether a new row starts
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 3), st.integers(-1, 1), st.booleans()),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(drawn, st.integers(0, 70))
def test_any_samples_in_any_packing(tools, models, drawn, width):
    """With dropout: as many images as rows, one image a row, none at all, rows of one sample: all are met here."""
    model = models("opt", dropout=0.1)
    samples = [tools.sample(i, n, prompt, target, head) for i, (n, prompt, target, head, _) in enumerate(drawn)]
    starts = torch.tensor([new for *_, new in drawn])
    packed = (starts.cumsum(0) - starts[0].long()).tolist()
    wanted = run(tools, model, tools.collate(samples))
    if not any(g.any() for g in wanted[0].values()):
        return  # nothing to predict
    assert_same(run(tools, model, tools.collate(samples, packed=packed, width=width)), wanted, 1e-12)


def test_units_of_any_cut_sum_to_the_same(tools, models, samples):
    """Where a sample is packed, its neighbours and its unit change nothing: with the draws of a fixed seed."""
    model = models("opt", dropout=0.1)
    whole = tools.gradients(model, tools.collate(samples))
    a, b, c, d, e = samples
    for cut in (([c, a], [0, 0]), ([d, e, b], [0, 0, 0])), (([e, d, c, b], [0, 0, 0, 1]), ([a], [0])):
        units = [tools.collate(members, packed=packed, width=40) for members, packed in cut]
        tools.assert_equal(tools.gradients(model, *units), whole, 1e-12)


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_no_sample_sees_another(tools, models, samples, kind):
    """Every other sample of the row is exchanged for one of the same lengths: not a bit changes."""
    model = models(kind)
    packed = [0] * len(samples)
    wanted = model(tools.collate(samples, packed=packed))
    for kept in range(len(samples)):
        others = [
            s if i == kept else replace(s, pixels=255 - s.pixels, tokens=(s.tokens + 7) % 30 + 3)
            for i, s in enumerate(samples)
        ]
        out = model(tools.collate(others, packed=packed))
        assert torch.equal(out["nll"][kept], wanted["nll"][kept])
        assert out["correct"][kept] == wanted["correct"][kept]
        assert not torch.equal(out["nll"], wanted["nll"])


def test_logits_and_heads_of_packed_samples(tools, models, samples):
    model = models("opt")
    plain, packed = tools.collate(samples), tools.collate(samples, packed=[0, 0, 1, 1, 1])
    live = plain.targets != -100
    torch.testing.assert_close(model.logits(packed)[live], model.logits(plain)[live], rtol=1e-11, atol=1e-11)
    for head in range(2):
        torch.testing.assert_close(model.head_logits(packed, head), model.head_logits(plain, head), rtol=1e-11, atol=0)


@pytest.mark.parametrize("packed", [None, *PACKINGS])
def test_nan_where_there_is_no_text_does_not_reach_the_loss(tools, models, samples, packed):
    """Padding up to the width, and lookups behind image tokens, hold NaN."""
    model = models("opt")
    batch = tools.collate(samples, extra=3, packed=packed, width=50)
    clean = run(tools, model, batch)
    layout = model._layout(batch, batch.image_row)
    nowhere = (layout.is_image | ~layout.real)[..., None]
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, out: torch.where(nowhere, float("nan"), out)
    )
    poisoned = run(tools, model, batch)
    handle.remove()
    assert torch.equal(poisoned[1]["loss_sum"], clean[1]["loss_sum"])
    tools.assert_equal(poisoned[0], clean[0], 0.0)


def test_modules_and_their_order_do_not_depend_on_packing(tools, models, samples):
    """What ZeRO-3 needs; text alone and a filler in packed rows, too, and all parameters have a gradient."""
    model, calls, runs = models("opt", dropout=0.1), [], []
    handles = [m.register_forward_hook(lambda module, *_: calls.append(module)) for m in model.modules()]
    text, filler = [tools.sample(5, 0, 3, 2), tools.sample(7, 0, 2, 2)], [replace(tools.sample(6, 0, 1, 0), weight=0.0)]
    for members, packed in (samples, None), (samples, PACKINGS[1]), (text, [0, 0]), (filler, [0]), (filler, None):
        calls.clear()
        gradients = tools.gradients(model, tools.collate(members, packed=packed, width=50))
        runs.append(list(calls))
        assert all(torch.isfinite(g).all() for g in gradients.values())
    for handle in handles:
        handle.remove()
    assert all(run == runs[0] for run in runs)
    assert all((g == 0).all() for g in gradients.values()), "a filler teaches nothing"


def test_a_row_may_be_longer_than_a_position_table(tools, models):
    """Positions start anew in every sample: only a sample can be too long."""
    model = models("opt")  # 64 positions
    samples = [tools.sample(i, 1, 10, 10) for i in range(4)]
    assert_same(
        run(tools, model, tools.collate(samples, packed=[0] * 4)), run(tools, model, tools.collate(samples)), 1e-12
    )
    run(tools, model, tools.collate(samples, width=80))
    with pytest.raises(ValueError, match="a sample of 75 tokens .* max_position_embeddings 64"):
        model(tools.collate([*samples, tools.sample(9, 1, 60, 10)], packed=[0] * 5))


def test_encoder_decoders_refuse_packed_rows_and_take_widths(tools, samples):
    model = tools.build(tools.recipe("t5")).double()
    with pytest.raises(ValueError, match="`pack` to false"):
        model(tools.collate(samples, "t5", packed=[0] * 5))
    wanted, found = (run(tools, model, tools.collate(samples, "t5", width=width)) for width in (0, 40))
    assert_same(found, wanted, 1e-6)


@pytest.mark.parametrize("shape", ["positions", "flat", "weights"])
def test_draws_are_those_of_rows_of_their_own(shape):
    """Bit for bit, in activations, flattened activations and attention weights."""
    lengths, keys, images = (3, 4, 2), torch.tensor([11, -5, 2**62]), torch.arange(9)
    row, start, rows, width = (0, 0, 1), (0, 3, 0), 2, 8
    tokens, position = torch.zeros(rows, width, dtype=torch.int64), torch.zeros(rows, width, dtype=torch.int64)
    for key, length, r, s in zip(keys, lengths, row, start, strict=True):
        tokens[r, s : s + length], position[r, s : s + length] = key, torch.arange(length)

    def draw(context, count, size):
        ones = {"positions": (count, size, 5), "flat": (count * size, 5), "weights": (count, 3, size, size)}[shape]
        torch.manual_seed(4)
        with context:
            kept = F.dropout(torch.ones(ones), 0.4) != 0
        return kept if shape == "weights" else kept.view(count, size, 5)

    own, packed = draw(KeyedDropout(keys, images), 3, 4), draw(KeyedDropout(tokens, images, position), rows, width)
    for i, (length, r, s) in enumerate(zip(lengths, row, start, strict=True)):
        there = slice(s, s + length)
        if shape == "weights":
            assert torch.equal(packed[r, :, there, there], own[i, :, :length, :length])
        else:
            assert torch.equal(packed[r, there], own[i, :length])
    with pytest.raises(ValueError, match=r"\(2, 3, 3\).*packed rows \(2, 8\)"):
        with KeyedDropout(tokens, images, position):
            F.dropout(torch.ones(2, 3, 3), 0.4)


def test_as_many_images_as_packed_rows_are_not_taken_for_rows(tools, models, samples):
    model = models("opt", dropout=0.1)
    batch = tools.collate(samples, packed=[0, 1, 2, 3, 3])
    assert len(batch.image_row) == 4 and len(model._images(batch)[1]) == 5
    batch = tools.collate([tools.mixed[0]] * 2, packed=[0, 1])  # nor where each row has one
    assert len(batch.image_row) == 2 and len(model._images(batch)[1]) == 3
