"""The contract: number of ranks, ZeRO stage and micro-batch change nothing about a window's gradient.

In fp64, as autograd hands it to the engine under each stage; what the engine makes of it is in test_weights.
"""

import itertools

import numpy as np
import pytest

from tests.dist.recipes import STRATEGIES, tiny


def assert_equal(found: dict, wanted: dict, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    scale = max(np.abs(value).max() for value in wanted.values())
    assert scale > 0
    for name in wanted:
        error = np.abs(found[name] - wanted[name]).max() / scale
        assert error <= tolerance, f"{name}: {error:.2e} of the largest gradient"


@pytest.fixture(scope="module")
def single(pools, data_root):
    """The gradient of one window on one rank without ZeRO: what all others must equal."""
    known = {}

    def reference(**changes):
        key = repr(sorted(changes.items()))
        if key not in known:
            known[key] = pools(1).run("gradient", recipe=tiny(data_root, **changes))[0]
        return known[key]

    return reference


RANKS_AND_STAGES = [*itertools.product((1, 2, 3), (0, 1, 2, 3))][1:]  # but the reference itself
ENOUGH = [(1, 3), (2, 2), (2, 3), (3, 1), (3, 3)]  # for the other strategies: stages do not know of them


@pytest.mark.parametrize("world_size, zero, strategy", [
    *((*place, "accumulate") for place in RANKS_AND_STAGES),
    *((*place, name) for name in STRATEGIES if name != "accumulate" for place in ENOUGH),
])  # fmt: skip
def test_world_size_and_stage(pools, data_root, single, world_size, zero, strategy):
    changes = STRATEGIES[strategy]
    found = pools(world_size).run("gradient", recipe=tiny(data_root, train__zero=zero, **changes))
    for rank in found:
        assert_equal(rank, single(**changes), 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("micro_batch", [1, 2, 64])
def test_micro_batch(pools, data_root, single, strategy, micro_batch):
    changes = STRATEGIES[strategy]
    found = pools(2).run("gradient", recipe=tiny(data_root, train__zero=3, train__micro_batch=micro_batch, **changes))
    assert_equal(found[0], single(**changes), 1e-12)


@pytest.mark.parametrize("rounds, normalise", [("packed", "token"), ("task", "task")])
def test_rounds_and_normalisation(pools, data_root, single, rounds, normalise):
    found = pools(2).run(
        "gradient", recipe=tiny(data_root, train__zero=3, schedule__rounds=rounds, schedule__normalise=normalise)
    )
    assert_equal(found[0], single(schedule__normalise=normalise), 1e-12)


@pytest.mark.parametrize("world_size, zero, micro_batch", [(2, 3, 3), (3, 2, 2), (2, 0, 1)])
def test_dropout(pools, data_root, single, world_size, zero, micro_batch):
    """Dropout is keyed by sample, so not even other units, and with them another micro-batch, change a draw."""
    changes = {"model__decoder__config__dropout": 0.1, "model__decoder__config__attention_dropout": 0.1}
    changed = tiny(data_root, train__zero=zero, train__micro_batch=micro_batch, **changes)
    found = pools(world_size).run("gradient", recipe=changed)
    assert_equal(found[0], single(**changes), 1e-12)
    without = single()
    assert any(np.abs(found[0][n] - without[n]).max() > 1e-4 for n in without), "dropout did nothing"


@pytest.mark.parametrize("decoder", ["llama", "t5"])
@pytest.mark.parametrize("world_size, zero", [(2, 3), (3, 2)])
def test_decoders(pools, data_root, single, decoder, world_size, zero):
    """LLaMA's and T5's norms compute in fp32 whatever the model's dtype, so fp64 ends there."""
    found = pools(world_size).run("gradient", recipe=tiny(data_root, decoder=decoder, train__zero=zero))
    assert_equal(found[0], single(decoder=decoder), 1e-7)


def test_dropout_with_recomputed_layers(pools, data_root, single):
    changes = {"model__decoder__config__dropout": 0.1}
    recipe = tiny(data_root, train__zero=3, model__gradient_checkpointing=True, **changes)
    found = pools(2).run("gradient", recipe=recipe)
    assert_equal(found[0], single(**changes), 1e-12)


LORA = {"model__lora": {"targets": ["self_attn.(q|v)_proj"], "r": 2, "alpha": 4, "dropout": 0.1}}


def test_lora_with_frozen_tower(pools, data_root, single):
    changes = LORA | {"model__freeze": ["^vision"]}
    found = pools(2).run("gradient", recipe=tiny(data_root, train__zero=3, **changes))
    assert_equal(found[0], single(**changes), 1e-12)
    assert any("lora" in name for name in found[0]) and not any(name.startswith("vision") for name in found[0])
