"""Batched greedy decoding with a cache equals decoding each row alone, whole, token by token."""

import pytest
import torch


def alone(model, tools, s, kind, steps):
    """Greedy decoding by `logits` of the whole row so far."""
    prompt = s.tokens[: len(s.tokens) - s.target]
    written = []
    for _ in range(steps):
        if kind == "t5":
            batch = tools.collate([s], kind)
            batch.decoder_tokens = torch.tensor([[tools.pad, *written]])
            batch.decoder_lengths = torch.tensor([len(written) + 1])
            batch.targets = torch.full_like(batch.decoder_tokens, -100)
        else:
            batch = tools.collate([s])
            batch.tokens = torch.cat((prompt, torch.tensor(written, dtype=torch.int64)))[None]
            batch.lengths = torch.tensor([batch.tokens.shape[1]])
            batch.targets = torch.full_like(batch.tokens, -100)
        written.append(int(model.logits(batch)[0, -1].argmax()))
        if written[-1] == tools.eos:
            break
    return written


@pytest.fixture
def model(tools, kind):
    """With large weights, so that it does not write one token for ever."""
    model = tools.build(tools.recipe(kind), seed=4).double().eval()
    torch.manual_seed(1)
    for parameter in model.decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0)
    return model


@torch.no_grad()
def test_batched_cached_equals_alone(model, tools, kind):
    samples = [*tools.mixed, tools.sample(11, 3, 1, 0), tools.sample(12, 0, 9, 0)]
    expected = [alone(model, tools, s, kind, 8) for s in samples]
    # an id that one row writes early and another never: rows then end at different steps
    batch = tools.collate(samples, kind, extra=2)
    lengths = torch.tensor([len(s.tokens) - s.target for s in samples])
    prompts = (batch.pixels, batch.image_row, batch.tokens, lengths)
    got = model.generate(*prompts, max_new_tokens=8, eos_id=-1)
    assert got.shape == (6, 8) and got.dtype == torch.int64
    assert len(set(got.flatten().tolist())) >= 4, "a test on constant output shows nothing"
    for row, want in zip(got.tolist(), expected, strict=True):
        assert row[: len(want)] == want

    eos = got[0, 2].item()
    stopped = model.generate(*prompts, max_new_tokens=8, eos_id=eos)
    for row, full in zip(stopped.tolist(), got.tolist(), strict=True):
        end = full.index(eos) + 1 if eos in full else 8
        assert row == (full[:end] + [tools.pad] * 8)[: stopped.shape[1]]


def test_generate_leaves_training_mode_as_it_was(model, tools, kind):
    batch = tools.collate(tools.mixed, kind)
    model.train()
    out = model.generate(batch.pixels, batch.image_row, batch.tokens, batch.lengths, max_new_tokens=2, eos_id=-1)
    assert model.training and out.shape == (4, 2) and not out.requires_grad


def test_nothing_to_write_is_no_wish(model, tools, kind):
    batch = tools.collate(tools.mixed, kind)
    with pytest.raises(ValueError, match="max_new_tokens 0 must be at least 1"):
        model.generate(batch.pixels, batch.image_row, batch.tokens, batch.lengths, max_new_tokens=0, eos_id=-1)


def test_generate_stops_when_all_rows_are_done(model, tools, kind):
    batch = tools.collate(tools.mixed[:1], kind)
    prompts = (batch.pixels, batch.image_row, batch.tokens, batch.lengths)
    first = model.generate(*prompts, max_new_tokens=1, eos_id=-1).item()
    assert model.generate(*prompts, max_new_tokens=50, eos_id=first).tolist() == [[first]]
