"""A gradient that is no number: every stage leaves its update out, and an interruption after it changes nothing."""

import json
import math

import numpy as np
import pytest

from dsvlm.train.checkpoint import complete_checkpoints, read_state, read_tensors
from dsvlm.train.engine import ds_configs
from tests.dist.recipes import tiny
from tests.dist.test_moe import MOE, SHARED

STEPS = 5
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")
CLOCK = ("seconds", "tokens_per_s", "data_wait")
OPTIM = {"optim__ema": 0.9, "optim__clip": 1.0, "optim__schedule": "cosine", "optim__weight_decay": 0.1}
POISONED = (0, 2)  # the first, before the optimizer has a state, and one in the middle
CASES = [*((zero, "fp32") for zero in (0, 1, 2, 3)),  # DeepSpeed has no bf16 without ZeRO
         *((zero, "bf16") for zero in (1, 2, 3, "zero2_offload", "zero3_offload"))]  # fmt: skip
SKIPPED = [step in POISONED for step in range(STEPS)]


@pytest.fixture
def recipe(data_root, tmp_path):
    """`recipe(name, zero)`: a run in a directory of that name; zero: a stage, or a name in ds_configs/."""

    def named(name, zero, **changes):
        if isinstance(zero, str):
            changes |= {"train__ds_config": str(ds_configs() / f"{zero}.json")}
            zero = int(zero[4])
        changes = OPTIM | {"schedule__steps": STEPS, "train__zero": zero, "train__keep": STEPS} | changes
        return tiny(data_root, output=str(tmp_path / name), **changes)

    return named


def told(recipe):
    rows = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{**row, **dict.fromkeys(CLOCK)} for row in rows]


def saved(recipe, step):
    """The state of a checkpoint and its tensors by kind and name."""
    (directory,) = (p for p in complete_checkpoints(recipe.run_dir) if read_state(p).step == step)
    tensors = {f"{kind} {name}": t.numpy() for kind in KINDS for name, t in read_tensors(directory, kind)}
    assert all(np.isfinite(t).all() for t in tensors.values())
    return read_state(directory), tensors


def differ(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted)


def check(rows, state):
    """Those were skipped that were poisoned, and no other."""
    assert [row["skipped"] for row in rows] == [math.isinf(row["grad_norm"]) for row in rows] == SKIPPED[: len(rows)]
    assert state.step == len(rows) and state.skipped == sum(SKIPPED[: len(rows)])


@pytest.mark.parametrize("zero, dtype", CASES)
def test_a_skipped_update_changes_nothing_and_neither_does_a_stop_after_it(pools, recipe, zero, dtype):
    """Bit for bit. A new engine remembers nothing of a skipped gradient, so the old one must not either."""
    straight, parts = (recipe(name, zero, train__dtype=dtype) for name in ("straight", "parts"))
    assert pools(2).run("train_until", recipe=straight, stop=STEPS, poisoned=POISONED) == [0, 0]
    for began, stop in [(0, 1), (1, 2), (2, 3), (3, STEPS)]:
        assert pools(2).run("train_until", recipe=parts, stop=stop, poisoned=POISONED) == [began, began]
        check(told(parts), saved(parts, stop)[0])
    assert differ(saved(parts, 3)[1], saved(parts, 2)[1]) == 0
    assert told(parts) == told(straight)
    (state, tensors), (wanted_state, wanted) = saved(parts, STEPS), saved(straight, STEPS)
    assert state == wanted_state
    assert differ(tensors, wanted) == 0


@pytest.mark.parametrize("zero", [0, 2])
def test_ranks_that_share_experts_skip_together(pools, recipe, zero):
    mine = recipe("run", zero, model__moe=MOE | SHARED, train__expert_parallel=True)
    pools(2).run("train_until", recipe=mine, stop=2, poisoned=POISONED)
    pools(2).run("train_until", recipe=mine, stop=3, poisoned=POISONED)
    check(told(mine), saved(mine, 3)[0])
    assert differ(saved(mine, 3)[1], saved(mine, 2)[1]) == 0


@pytest.mark.parametrize("zero, other_size, other_zero", [(0, 3, 2), (2, 2, 3), (3, 1, 0), (2, 3, 0)])
def test_gone_on_with_on_other_ranks_or_another_stage(pools, recipe, zero, other_size, other_zero):
    straight, parts = recipe("run", zero), recipe("other", zero)
    pools(2).run("train_until", recipe=straight, stop=STEPS, poisoned=POISONED)
    pools(2).run("train_until", recipe=parts, stop=3, poisoned=POISONED)
    pools(other_size).run("train_until", recipe=recipe("other", other_zero), stop=STEPS, poisoned=POISONED)
    rows, wanted_rows = told(parts), told(straight)
    assert [row["lr"] for row in rows] == [row["lr"] for row in wanted_rows]
    np.testing.assert_allclose([r["loss"] for r in rows], [r["loss"] for r in wanted_rows], rtol=1e-5)
    assert differ(saved(parts, STEPS)[1], saved(straight, STEPS)[1]) < 1e-5


def test_it_is_said_once_on_the_first_rank(pools, recipe):
    first, other = pools(2).run("warnings_of", recipe=recipe("run", 2), stop=3, poisoned=POISONED)
    assert len(first) == 1 and "was skipped" in first[0] and "optim.lr" in first[0]
    assert other == []


@pytest.mark.parametrize("zero", [0, 3])
def test_weights_that_are_no_numbers_are_not_gone_on_from(pools, recipe, zero):
    mine = recipe("run", zero)
    pools(2).run("train_until", recipe=mine, stop=1)
    for message in pools(2).run("error_from_bad_weights", recipe=mine):
        assert "step_00000001" in message and "no numbers" in message
