"""Learning rates: schedules at their ends, parameter groups, patterns that match nothing."""

import pytest
import torch

from dsvlm.config import GroupConfig, OptimConfig
from dsvlm.train.optim import lr_factor, make_optimizer, parameter_groups, set_lr


def test_schedules_begin_and_end_where_they_say():
    steps = 100
    for schedule in ("cosine", "linear"):
        optim = OptimConfig(schedule=schedule, warmup=10, floor=0.1)
        factors = [lr_factor(step, steps, optim) for step in range(steps)]
        assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
        assert factors[-1] == pytest.approx(0.1)
        assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert {lr_factor(s, steps, OptimConfig(schedule="constant")) for s in range(steps)} == {1.0}


def test_groups_first_match_wins_and_vectors_do_not_decay():
    model = torch.nn.ModuleDict({"tower": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    optim = OptimConfig(lr=1.0, weight_decay=0.5, groups=(GroupConfig("^tower", lr=0.1), GroupConfig("^head|tower")))
    found = {(g["base_lr"], g["weight_decay"]): len(g["params"]) for g in parameter_groups(model, optim)}
    assert found == {(0.1, 0.5): 1, (0.1, 0.0): 1, (1.0, 0.5): 1, (1.0, 0.0): 1}
    optimizer = make_optimizer(model, optim)
    assert set_lr(optimizer, 0.5) == optimizer.param_groups[0]["lr"]
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [0.05, 0.5]


def test_a_pattern_for_nothing_is_an_error():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"optim.groups\[0\].match: 'visoin'.*weight"):
        parameter_groups(model, OptimConfig(groups=(GroupConfig("visoin"),)))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is left to train"):
        parameter_groups(model, OptimConfig())
