import numpy as np
import pytest
from hypothesis import strategies as st

from dsvlm.schedule.plan import STRATEGIES, Schedule, Stream


@st.composite
def _schedules(draw, strategies=STRATEGIES, rounds=("task", "packed")):
    strategy = draw(st.sampled_from(strategies))
    streams = tuple(
        Stream(
            name=f"task{index}",
            shard_sizes=(*draw(st.lists(st.integers(0, 40), max_size=8)), draw(st.integers(1, 40))),
            samples=draw(st.integers(1, 30)),
            quota=draw(st.integers(1, 5)),
        )
        for index in range(draw(st.integers(1, 4)))
    )
    chunk = draw(st.integers(1, 9))
    chunks = 1 if strategy == "unified" else draw(st.integers(1, 7))
    return Schedule(
        seed=draw(st.integers(0, 2**64)),
        strategy=strategy,
        streams=streams,
        rounds=draw(st.sampled_from(rounds)),
        block=draw(st.sampled_from((1, 2, 3, 7, 64))),
        group=draw(st.integers(1, 5)),
        samples=chunk * chunks,
        chunk=chunk,
    )


@pytest.fixture(scope="session")
def schedules():
    """Strategy that draws small schedules: uneven shards (also empty ones), any strategy, rounds, block and group."""
    return _schedules


@pytest.fixture(scope="session")
def live():
    """Function that lists the (task, epoch, sample) a cut of a window runs, in the order of units: rank by rank."""

    def list_samples(plan, window, rounds):
        triples = []
        for part in rounds:
            for rank in range(part.world_size):
                task, ordinal = window.span(*part.span(rank))
                for one, number in zip(task.tolist(), ordinal, strict=True):
                    epoch, sample = plan.locate(one, np.array([number]))
                    triples.append((one, int(epoch[0]), int(sample[0])))
        return triples

    return list_samples
