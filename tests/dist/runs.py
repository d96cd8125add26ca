"""Cases of the pools that train as `dsvlm train` does, from plan to checkpoint, without starting processes."""

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist

import dsvlm.train.loop as loop
from dsvlm.train.build import plan_run
from dsvlm.train.guard import Guard
from dsvlm.train.loop import build_run, save, train_step
from dsvlm.train.preempt import StopFlag


def train_until(recipe, stop: int, poisoned: Sequence[int] = ()) -> int:
    """Trains, from the run's latest checkpoint if there is one, until `stop` updates are done, and saves.

    poisoned: steps at which the last rank's losses are NaN. Returns with how many updates it began.
    """
    planned = plan_run(recipe)
    run = build_run(planned, Guard(60), StopFlag(), torch.device("cpu"))
    began = run.state.step
    if dist.get_rank() == dist.get_world_size() - 1:
        run.engine.module.register_forward_hook(
            lambda _, args, out: out | {"loss_sum": out["loss_sum"] * (torch.nan if run.state.step in poisoned else 1)}
        )
    try:
        while run.state.step < stop:
            assert not train_step(run)
        save(run)
    finally:
        run.metrics.close()
        run.loader.close()
        run.engine.destroy()
    return began


def warnings_of(recipe, stop: int, poisoned: Sequence[int]) -> list[str]:
    """What this rank says in a training of updates that are skipped."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        train_until(recipe, stop, poisoned)
    return [str(warning.message) for warning in told if "skipped" in str(warning.message)]


def error_of_a_full_disk(recipe, step: int) -> str:
    """The error of a training whose metrics cannot be written any more."""
    run = build_run(plan_run(recipe), Guard(60), StopFlag(), torch.device("cpu"))
    try:
        while True:
            if run.metrics.on and run.state.step == step:
                run.metrics.lines = open("/dev/full", "w")
            train_step(run)
            if run.state.step == recipe.schedule.steps:
                save(run)
    except ValueError as error:
        return str(error)
    finally:
        run.metrics.close()
        run.loader.close()
        run.engine.destroy()


def error_from_bad_weights(recipe) -> str:
    """The error of going on from a checkpoint whose weights are NaN."""
    load = loop.load_weights

    def load_bad(model, directory):
        load(model, directory)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)

    loop.load_weights = load_bad
    try:
        train_until(recipe, stop=2)
    except ValueError as error:
        return str(error)
    finally:
        loop.load_weights = load
    return ""
