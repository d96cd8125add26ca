"""A window's normalisation, and that rows without weight are as if they were not there."""

import dataclasses

import numpy as np
import pytest
import torch

from dsvlm.data.convert.scenes import make_scenes
from dsvlm.train.build import make_loader, make_model, make_tokenizer, plan_run
from dsvlm.train.window import WindowSums, target_weights
from tests.dist.recipes import tiny

TASKS = {
    "question": {"type": "vqa", "shards": "train/question", "samples": 5},
    "locate": {"type": "locate", "shards": "train/locate", "samples": 3},
}


def test_target_weights():
    counts, weights, heads = np.array([10, 30, 4]), [1.0, 2.0, 3.0], [-1, -1, 0]
    np.testing.assert_allclose(target_weights(counts, weights, heads, "token"), [1 / 40, 2 / 40, 3 / 4])
    np.testing.assert_allclose(target_weights(counts, weights, heads, "task"), [1 / 10, 2 / 30, 3 / 4])
    np.testing.assert_allclose(target_weights(np.array([10, 0, 0]), weights, heads, "task"), [1 / 10, 0, 0])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("window")
    make_scenes(root, samples=16, val_samples=4, tasks=("question", "locate"))
    recipe = tiny(root, tasks=TASKS, train__micro_batch=8)
    planned = plan_run(recipe)
    codec = make_tokenizer(planned)
    return make_model(recipe, codec).double(), make_loader(planned, codec, 40, 0, 1)


def gradient(model, batches) -> dict:
    model.zero_grad()
    for batch in batches:
        model(batch)["loss_sum"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("poison", ["reason", "filler"])
def test_masked_samples_and_fillers_are_neutral(parts, poison):
    """The gradient with a masked row or an empty unit is the one without it: same N, nothing added."""
    model, loader = parts
    window = loader.window(0)
    weights = [0.1, 0.2]
    if poison == "filler":
        wanted = gradient(model, loader.batches(window, weights))
        window.units.append([])
    else:
        masked = [dataclasses.replace(d, reason="bad" if i % 3 == 1 else None) for i, d in enumerate(window.units[0])]
        rest = [d for d in masked if not d.reason]
        wanted = gradient(model, loader.batches(dataclasses.replace(window, units=[rest, *window.units[1:]]), weights))
        window.units[0] = masked
    found = gradient(model, loader.batches(window, weights))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=name)


def test_every_micro_step_gives_every_parameter_a_gradient(parts):
    """Also a filler: what ZeRO-3 needs of a constant module signature."""
    model, loader = parts
    window = dataclasses.replace(loader.window(0), units=[[]])
    grads = gradient(model, loader.batches(window, [1.0, 1.0]))
    assert all(not value.any() for value in grads.values())


def test_positions_used_and_computed_are_summed_per_task(parts):
    """Of images and text; padding, fillers and samples that do not teach are computed for nothing."""
    model, loader = parts
    window = loader.window(0)
    window.units[1][0] = dataclasses.replace(window.units[1][0], reason="bad")
    first, second = loader.batches(window, [0.1, 0.2])
    lengths = [batch.lengths + model.vision.tokens for batch in (first, second)]
    packed = dataclasses.replace(first, row=torch.tensor([0, 0, 1, 1, 1]), width=400)
    sums = WindowSums(2, torch.device("cpu"))
    for batch in (packed, second):
        sums.add(batch, model(batch))
    used, computed = sums.numpy()[4:]
    assert used.tolist() == [lengths[0].sum(), lengths[1][1:].sum()]
    np.testing.assert_allclose(computed, [2 * 400, 3 * lengths[1].max()])
