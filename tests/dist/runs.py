"""Cases of the pools that train as `dsvlm train` does, from plan to checkpoint, without starting processes."""

import torch

from dsvlm.train.build import plan_run
from dsvlm.train.guard import Guard
from dsvlm.train.loop import build_run, save, train_step
from dsvlm.train.preempt import StopFlag


def train_until(recipe, stop: int) -> int:
    """Trains, from the run's latest checkpoint if there is one, until `stop` updates are done, and saves.

    Returns with how many updates it began.
    """
    planned = plan_run(recipe)
    run = build_run(planned, Guard(60), StopFlag(), torch.device("cpu"))
    began = run.state.step
    try:
        while run.state.step < stop:
            assert not train_step(run)
        save(run)
    finally:
        run.metrics.close()
        run.loader.close()
        run.engine.destroy()
    return began
