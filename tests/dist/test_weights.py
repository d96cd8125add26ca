"""Weights after updates with the engine's own reduced gradients: against one rank without ZeRO, and staleness."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dsvlm.train.engine import ds_configs, read_ds_config
from tests.dist.recipes import STRATEGIES, tiny

STEPS = 3
TWO_GROUPS = {"optim__weight_decay": 0.1}  # of the optimizer
TEXT_FIRST = {"schedule__rounds": "task", "train__micro_batch": 8}


def worst(found: dict, wanted: dict) -> float:
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted)


@pytest.fixture(scope="module")
def single(pools, data_root):
    """The weights on one rank without ZeRO: what all others must equal."""
    known = {}

    def reference(strategy: str) -> dict:
        if strategy not in known:
            recipe = tiny(data_root, **TEXT_FIRST, **STRATEGIES[strategy])
            known[strategy] = pools(1).run("weights_after", recipe=recipe, steps=STEPS)[0]
        return known[strategy]

    return reference


@pytest.mark.parametrize("world_size, zero, strategy", [
    *((*place, "accumulate") for place in [(2, 0), (2, 1), (2, 2), (2, 3), (3, 1), (3, 3)]),
    *((*place, name) for name in STRATEGIES if name != "accumulate" for place in [(2, 1), (2, 3), (3, 3)]),
])  # fmt: skip
def test_same_weights(pools, data_root, single, world_size, zero, strategy):
    recipe = tiny(data_root, train__zero=zero, **TEXT_FIRST, **STRATEGIES[strategy])
    for rank in pools(world_size).run("weights_after", recipe=recipe, steps=STEPS):
        assert worst(rank, single(strategy)) < 2e-5


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_offloaded_optimizers_take_the_same_steps(pools, data_root, single, name):
    own = {"train__zero": int(name[4]), "train__ds_config": str(ds_configs() / f"{name}.json")}
    recipe = tiny(data_root, **own, **TEXT_FIRST)
    assert worst(pools(2).run("weights_after", recipe=recipe, steps=STEPS)[0], single("accumulate")) < 2e-5


def test_shipped_configurations_are_readable(data_root):
    for path in ds_configs().glob("*.json"):
        assert read_ds_config(tiny(data_root, train__zero=int(path.stem[4]), train__ds_config=str(path)))


@pytest.mark.parametrize("key, value, shared", [
    ("round_robin_gradients", True, False), ("compute_grad_norm", False, False), ("contiguous_gradients", False, True),
    ("reduce_scatter", False, True),
])  # fmt: skip
def test_configurations_that_would_train_or_save_something_else(data_root, tmp_path, key, value, shared):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, key: value}}))
    recipe = tiny(data_root, train__zero=1, train__ds_config=str(path))
    if shared:
        read_ds_config(recipe)
        recipe = replace(recipe, train=replace(recipe.train, expert_parallel=True))
    with pytest.raises(ValueError, match=f"own.json sets '{key}'"):
        read_ds_config(recipe)


@pytest.mark.parametrize("settings, words", [
    ({"mics_shard_size": 2}, "mics_shard_size to 2: Extra inputs are not permitted"),
    ({"offload_optimizer": {"device": "gpu"}}, "offload_optimizer.device to 'gpu': Input should be"), ({}, ""),
])  # fmt: skip
def test_what_deepspeed_does_not_take_is_told_in_one_line(pools, data_root, tmp_path, settings, words):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1} | settings}))
    recipe = tiny(data_root, train__zero=1, train__ds_config=str(path))
    (told,) = pools(1).run("error_of_settings", recipe=recipe)
    assert told.startswith(f"train.ds_config: {path} sets zero_optimization.{words}" if words else "")
    assert bool(told) == bool(words) and "\n" not in told


def test_stale_gradients_without_the_dummy_image(pools, data_root, single):
    """The measured ZeRO-3 trap: a text task first in the window, and last window's vision gradients are added again."""
    recipe = tiny(data_root, train__zero=3, **TEXT_FIRST)
    stale = pools(2).run("weights_after", recipe=recipe, steps=STEPS, drop_dummy=True)[0]
    right = single("accumulate")
    vision = [name for name in right if name.startswith("vision")]
    assert max(float(np.abs(stale[name] - right[name]).max()) for name in vision) > 1e-3
    kept = pools(2).run("weights_after", recipe=recipe, steps=STEPS)[0]
    assert worst(kept, right) < 2e-5


@pytest.mark.parametrize("world_size, zero, dtype", [
    (1, 0, "fp32"), (2, 3, "fp32"), (2, 1, "fp32"), (3, 2, "fp32"), (2, 3, "bf16"), (2, 2, "bf16"),
])  # fmt: skip
def test_resume_on_the_same_ranks_is_exact(pools, data_root, world_size, zero, dtype, tmp_path):
    recipe = tiny(data_root, train__zero=zero, train__dtype=dtype, **TWO_GROUPS)
    steps = {"steps": 2, "then": 2}
    straight = pools(world_size).run("go_straight", recipe=recipe, directory=str(tmp_path), **steps)
    again = pools(world_size).run("go_on", recipe=recipe, path=straight[0][0], **steps)
    for (_, losses, averages), (losses_again, averages_again) in zip(straight, again, strict=True):
        assert losses == losses_again
        assert worst(averages_again, averages) == 0


@pytest.mark.parametrize("other_size, zero, other_zero", [(2, 3, 1), (2, 1, 3), (1, 3, 0), (3, 3, 3), (3, 2, 1)])
def test_resume_on_other_ranks_or_another_stage(pools, data_root, other_size, zero, other_zero, tmp_path):
    """A checkpoint of two ranks: up to the order of summation."""
    steps = {"steps": 2, "then": 2}
    recipe, other = (tiny(data_root, train__zero=z, **TWO_GROUPS) for z in (zero, other_zero))
    path, losses, averages = pools(2).run("go_straight", recipe=recipe, directory=str(tmp_path), **steps)[0]
    losses_again, averages_again = pools(other_size).run("go_on", recipe=other, path=path, **steps)[0]
    np.testing.assert_allclose(losses_again, losses, rtol=1e-5)
    assert worst(averages_again, averages) < 1e-5
