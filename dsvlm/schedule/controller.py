"""Controllers: from what all ranks have measured to how often each task takes part in windows, decided now and then.

A plan with a controller is a pure function of (state, step). The state is the same on all ranks, for it is made of
all-reduced sums only, and checkpoints keep it. For strategies accumulate and mixed, whose windows then are smaller.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from dsvlm.schedule.mixture import Phase, Taken, rows

# Of each task: samples before the interval; it takes part in updates since, since + gap, ...; sums over the interval.
FIELDS = (("cursor", "<i8"), ("since", "<u4"), ("gap", "<u2"), ("nll", "<f8"), ("targets", "<f8"))


class Controller(Protocol):
    """Decides after every `every` updates; `memory` names the numpy fields that it keeps of each task."""

    every: int
    memory: ClassVar[tuple[tuple[str, str], ...]]

    def begin(self, tasks: np.ndarray) -> None:
        """Set the memory at the start of a run; `tasks: [tasks]` records of FIELDS and memory."""

    def decide(self, tasks: np.ndarray, scores: np.ndarray) -> None:
        """Set the gaps from the scores `[tasks] float64` of an interval, NaN where a task trained on nothing."""


def score(nll: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + mean loss), [tasks] float64: positive and better when higher, as relative thresholds need it.

    NaN without targets. 12-in-1 scores validation sets; these are the training losses that every update sums anyway.
    """
    return np.divide(targets, targets + nll, out=np.full(len(nll), np.nan), where=targets > 0)


class Progress(NamedTuple):
    """What stop-and-go knows of one task."""

    best: float = -np.inf
    bad: int = 0
    cooldown: int = 0
    stopped: bool = False


@dataclass(frozen=True)
class StopAndGo:
    """Dynamic stop-and-go of 12-in-1 (Lu et al. 2020; released code, MultiTaskStopOnPlateau).

    A task whose score has not gained a share of `gain` over its best for more than `patience` decisions stops: it takes
    part in every `gap`-th update only. It goes on as before when its score falls a share of `loss` below its best.
    """

    every: int = 100
    gap: int = 4
    patience: int = 1
    gain: float = 0.001
    loss: float = 0.005
    cooldown: int = 1
    memory: ClassVar = (("best", "<f8"), ("bad", "<u2"), ("cooldown", "<u2"))

    def begin(self, tasks: np.ndarray) -> None:
        tasks["best"] = -np.inf

    def decide(self, tasks: np.ndarray, scores: np.ndarray) -> None:
        for task, value in zip(tasks, scores.tolist(), strict=True):
            if value == value:
                now = Progress(float(task["best"]), int(task["bad"]), int(task["cooldown"]), bool(task["gap"] > 1))
                new = self.judge(now, value)
                task["best"], task["bad"], task["cooldown"] = new[:3]
                task["gap"] = self.gap if new.stopped else 1

    def judge(self, task: Progress, value: float) -> Progress:
        """Return what is known of a task after one more score."""
        best, bad, cooldown, stopped = task
        if value > best * (1 + self.gain):
            best, bad = value, 0
        else:
            bad += 1
        if cooldown > 0:
            cooldown, bad = cooldown - 1, 0
        if bad > self.patience:
            return Progress(best, 0, self.cooldown, True)
        if stopped and value < best * (1 - self.loss):
            return Progress(best, 0, self.cooldown, False)
        return Progress(best, bad, cooldown, stopped)


CONTROLLERS = {"stop_and_go": StopAndGo}


class State(NamedTuple):
    """start: first update that the latest decision holds for; tasks: [tasks] records, never written to."""

    start: int
    tasks: np.ndarray


class Controlled:
    """Blocks of windows, as `Taken`, from which a controller leaves tasks out.

    A stopped task takes part in ceil(n / gap) of the n updates since it stopped. Where every task with a share is
    stopped, all of them take part in every update.
    """

    def __init__(self, phases: Sequence[Phase], controller: Controller):
        self.taken, self.controller = Taken(phases), controller
        self.fields = np.dtype([*FIELDS, *controller.memory])
        tasks = np.zeros(len(phases[0].shares), self.fields)
        tasks["gap"] = 1
        controller.begin(tasks)
        self.state = State(0, tasks)

    def table(self, step: int) -> np.ndarray:
        """Rows (task, first ordinal, count) of a window, [blocks, 3] int64, as if later decisions changed nothing."""
        state = self.state  # once: another thread may take in feedback meanwhile
        index = self.taken.phase(step)
        due = (step - state.tasks["since"].astype(np.int64)) % self._gaps(state, slice(index, index + 1))[0] == 0
        return rows(self._cursors(state, step), self.taken.shares[index] * due)

    def cursors(self, step: int) -> np.ndarray:
        """Samples of each task before a step, [tasks] int64."""
        return self._cursors(self.state, step)

    def steps_of(self, task: int, ordinals: np.ndarray) -> np.ndarray:
        """Steps of samples of a task, [n] int64, as if it took part in every update; NEVER after its last phase."""
        ahead = int(self.taken.cursors(self.state.start)[task]) - int(self.state.tasks["cursor"][task])
        return self.taken.steps_of(task, ordinals + ahead)

    def observe(self, step: int, nll: np.ndarray, targets: np.ndarray) -> bool:
        """Take in an update's sums over all ranks, `[tasks] float64` each; return whether later windows changed."""
        start, tasks = self.state.start, self.state.tasks.copy()
        assert start <= step < start + self.controller.every, "every update is observed once, in order"
        tasks["nll"] += nll
        tasks["targets"] += targets
        if (step + 1) % self.controller.every:
            self.state = State(start, tasks)
            return False
        tasks["cursor"] = self.cursors(step + 1)
        self.controller.decide(tasks, score(tasks["nll"], tasks["targets"]))
        changed = tasks["gap"] != self.state.tasks["gap"]
        tasks["since"][changed] = step + 1
        tasks["nll"] = tasks["targets"] = 0
        self.state = State(step + 1, tasks)
        return bool(changed.any())

    def stopped(self) -> list[int]:
        """Tasks that do not take part in every update."""
        return np.flatnonzero(self.state.tasks["gap"] > 1).tolist()

    def pack(self) -> str:
        """The state as text: 8 bytes and 42 of each task (stop-and-go), in base64."""
        return base64.b64encode(self.state.start.to_bytes(8, "little") + self.state.tasks.tobytes()).decode()

    def restore(self, text: str) -> None:
        """Go on from a state that was packed."""
        data = base64.b64decode(text)
        assert len(data) == 8 + self.state.tasks.nbytes, "only the same run goes on from its checkpoint"
        self.state = State(int.from_bytes(data[:8], "little"), np.frombuffer(data[8:], self.fields))

    def _gaps(self, state: State, phases: slice) -> np.ndarray:
        """Gaps in force in each of some phases, [phases, tasks] int64."""
        gap = state.tasks["gap"].astype(np.int64)
        going = ((self.taken.shares[phases] > 0) & (gap == 1)).any(axis=1)
        return np.where(going[:, None], gap, 1)

    def _cursors(self, state: State, step: int) -> np.ndarray:
        assert step >= state.start, "windows before a decision are not kept"
        taken, since = self.taken, state.tasks["since"].astype(np.int64)
        phases = slice(taken.phase(state.start), taken.phase(step) + 1)
        low = np.maximum(taken.starts[phases], state.start)[:, None]
        high = np.append(low[1:], step)[:, None]
        gaps = self._gaps(state, phases)
        updates = (since - low) // gaps - (since - high) // gaps  # ceil((high - since) / gap) less the same of low
        return state.tasks["cursor"] + (updates * taken.shares[phases]).sum(axis=0)
