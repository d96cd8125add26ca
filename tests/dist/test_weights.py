"""Weights after updates with the engine's own reduced gradients: against one rank without ZeRO, and against staleness."""

import numpy as np
import pytest
from tests.dist.recipes import tiny

STEPS = 3
TEXT_FIRST = {"schedule__rounds": "task", "train__micro_batch": 8}


def worst(found: dict, wanted: dict) -> float:
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted)


@pytest.fixture(scope="module")
def single(pools, data_root):
    return pools(1).run("weights_after", recipe=tiny(data_root, **TEXT_FIRST), steps=STEPS)[0]


@pytest.mark.parametrize("world_size, zero", [(2, 0), (2, 1), (2, 2), (2, 3), (3, 3)])
def test_same_weights(pools, data_root, single, world_size, zero):
    found = pools(world_size).run("weights_after", recipe=tiny(data_root, train__zero=zero, **TEXT_FIRST), steps=STEPS)
    for rank in found:
        assert worst(rank, single) < 2e-5


def test_stale_gradients_without_the_dummy_image(pools, data_root, single):
    """The measured ZeRO-3 trap: a text task first in the window, and last window's vision gradients are added again."""
    recipe = tiny(data_root, train__zero=3, **TEXT_FIRST)
    stale = pools(2).run("weights_after", recipe=recipe, steps=STEPS, drop_dummy=True)[0]
    vision = [name for name in single if name.startswith("vision")]
    assert max(float(np.abs(stale[name] - single[name]).max()) for name in vision) > 1e-3
    kept = pools(2).run("weights_after", recipe=recipe, steps=STEPS)[0]
    assert worst(kept, single) < 2e-5


@pytest.mark.parametrize("world_size, zero, other", [(1, 0, 0), (2, 3, 3), (2, 3, 1), (2, 1, 3), (2, 2, 0), (3, 2, 2)])
def test_resume(pools, data_root, world_size, zero, other, tmp_path):
    """Straight on and from the checkpoint: bit for bit under the same stage, up to rounding under another."""
    recipe = tiny(data_root, train__zero=zero)
    found = pools(world_size).run(
        "save_and_read", recipe=recipe, directory=str(tmp_path), steps=2, then=2, other_zero=other
    )
    for straight, again, averages in found:
        if zero == other:
            assert straight == again and averages == 0.0
        else:
            np.testing.assert_allclose(again, straight, rtol=1e-5)
            assert averages < 1e-5
