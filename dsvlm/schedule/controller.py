"""Controllers: from what all ranks have measured to how often each task takes part in windows, decided now and then.

A plan with a controller is a pure function of (state, step). The state is the same on all ranks, for it is made of
all-reduced sums only, and checkpoints keep it. For strategies accumulate and mixed, whose windows then are smaller.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from dsvlm.schedule.compact import pack_columns, unpack_columns
from dsvlm.schedule.mixture import Phase, Taken, rows

# Of each task: samples before the interval; it takes part in every gap-th update, those of `turn` modulo gap; 1 + its
# mean loss over the updates of the interval so far, 0 without any.
FIELDS = (("cursor", "<i8"), ("turn", "<u2"), ("gap", "<u2"), ("cost", "<f4"))
HUGE = 2.0**100  # a cost above it counts as this: finite in an <f4, so that a mean stays one
SCORE_BITS = 15  # that are kept: 64 tasks fit into 1 KB, and gains of 0.1 % are far above the rounding
# Fields of stop-and-go in the first version, which packed them as they are.
FIRST = [("cursor", "<i8"), ("since", "<u4"), ("gap", "<u2"), ("nll", "<f8"), ("targets", "<f8"),
         ("best", "<f8"), ("bad", "<u2"), ("cooldown", "<u2")]  # fmt: skip


class Controller(Protocol):
    """Decides after every `every` updates; `memory` names the numpy fields that it keeps of each task, 0 at first."""

    every: int
    memory: ClassVar[tuple[tuple[str, str], ...]]

    def decide(self, tasks: np.ndarray, scores: np.ndarray) -> None:
        """Set the gaps of records of FIELDS and memory, `[tasks]`, from the scores `[tasks] float64` of an interval.

        A score is NaN where a task trained on nothing.
        """


def score(cost: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + mean loss), [tasks] float64: positive and better when higher, as relative thresholds need it.

    NaN without targets. 12-in-1 scores validation sets; these are the training losses that every update sums anyway.
    """
    return rounded(np.divide(1, cost, out=np.full(len(cost), np.nan), where=cost != 0), SCORE_BITS)


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """Return the nearest floats of so many significant bits, [...] float64."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


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
    memory: ClassVar = (("best", "<f4"), ("bad", "<u2"), ("cooldown", "<u2"))

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

    chunk = 0

    def __init__(self, phases: Sequence[Phase], controller: Controller):
        self.taken, self.controller = Taken(phases), controller
        self.fields = np.dtype([*FIELDS, *controller.memory])
        tasks = np.zeros(len(phases[0].shares), self.fields)
        tasks["gap"] = 1
        self.state = State(0, tasks)
        self.cost_bits = min(24, 13 + controller.every.bit_length())  # with more updates one adds less
        self._unit = np.maximum(np.gcd.reduce(self.taken.shares), 1)  # every cursor is a multiple of it

    def table(self, step: int) -> np.ndarray:
        """Rows (task, first ordinal, count) of a window, [blocks, 3] int64, as if later decisions changed nothing."""
        state = self.state  # once: another thread may take in feedback meanwhile
        index = self.taken.phase(step)
        due = (step - state.tasks["turn"].astype(np.int64)) % self._gaps(state, slice(index, index + 1))[0] == 0
        return rows(self._cursors(state, step), self.taken.shares[index] * due)

    def cursors(self, step: int) -> np.ndarray:
        """Samples of each task before a step, [tasks] int64."""
        return self._cursors(self.state, step)

    def steps_of(self, task: int, ordinals: np.ndarray) -> np.ndarray:
        """Steps of samples of a task, [n] int64, as if it took part in every update; NEVER after its last phase."""
        ahead = int(self.taken.cursors(self.state.start)[task]) - int(self.state.tasks["cursor"][task])
        return self.taken.steps_of(task, ordinals + ahead)

    def observe(self, step: int, nll: np.ndarray, targets: np.ndarray) -> bool:
        """Take in an update's sums over all ranks, `[tasks] float64` each; return whether later windows changed.

        An update in which all of a task's samples were masked counts as one with the mean loss so far.
        """
        start, tasks = self.state.start, self.state.tasks.copy()
        assert start <= step < start + self.controller.every, "every update is observed once, in order"
        taught, cost = targets > 0, tasks["cost"].astype(np.float64)
        new = np.minimum(np.divide(targets + nll, targets, out=cost.copy(), where=taught), HUGE)
        updates, samples = self._updates(self.state, step + 1)
        count = np.where(cost == 0, 1, np.maximum((updates * (samples > 0)).sum(axis=0), 1))
        tasks["cost"] = rounded(cost + (new - cost) / count, self.cost_bits)
        if (step + 1) % self.controller.every:
            self.state = State(start, tasks)
            return False
        tasks["cursor"] = self.cursors(step + 1)
        self.controller.decide(tasks, score(tasks["cost"]))
        changed = tasks["gap"] != self.state.tasks["gap"]
        tasks["turn"][changed] = (step + 1) % tasks["gap"][changed]
        tasks["cost"] = 0
        self.state = State(step + 1, tasks)
        return bool(changed.any())

    def stopped(self) -> list[int]:
        """Tasks that do not take part in every update."""
        return np.flatnonzero(self.state.tasks["gap"] > 1).tolist()

    def pack(self) -> str:
        """The state as text; stop-and-go: at most 14 characters a task in runs of millions of updates."""
        start, tasks = self.state.start, self.state.tasks.copy()
        tasks["cursor"] = (self.taken.cursors(start) - tasks["cursor"]) // self._unit  # 0 of tasks that never stopped
        tasks["gap"] -= 1
        columns = [_bits(tasks[name]).tolist() for name in self.fields.names]
        return f"{start}:{base64.b85encode(pack_columns(columns)).decode()}"

    def restore(self, text: str, step: int) -> None:
        """Go on with update `step` from a state that was packed; ValueError when it cannot be this controller's."""
        try:
            if not isinstance(text, str):
                raise ValueError("no text")
            state = self._unpacked(text)
            if not 0 <= state.start <= step < state.start + self.controller.every:
                raise ValueError(f"of update {state.start}, not {step}")
            if (state.tasks["gap"] <= 0).any() or (state.tasks["cursor"] < 0).any():
                raise ValueError("numbers out of range")
        except (ValueError, IndexError, OverflowError, ZeroDivisionError) as error:
            raise ValueError(
                f"the checkpoint's state of schedule.controller is damaged ({text!r:.60}: {error}): remove that "
                "checkpoint's directory, and training goes on from the one before"
            ) from error
        self.state = state

    def _unpacked(self, text: str) -> State:
        start, colon, packed = text.partition(":")
        if not colon:
            return self._first(base64.b64decode(text))
        tasks = np.zeros_like(self.state.tasks)
        columns = unpack_columns(base64.b85decode(packed), len(tasks))
        for name, column in zip(self.fields.names, columns, strict=True):
            _bits(tasks[name])[:] = column
        tasks["cursor"] = self.taken.cursors(int(start)) - tasks["cursor"] * self._unit
        tasks["gap"] += 1
        return State(int(start), tasks)

    def _first(self, data: bytes) -> State:
        """The state as the first version packed it: with the interval's sums instead of a mean."""
        start, old = int.from_bytes(data[:8], "little"), np.frombuffer(data[8:], FIRST)
        tasks = np.zeros_like(self.state.tasks)
        for name in ("cursor", "gap", "bad", "cooldown"):
            tasks[name] = old[name]
        tasks["turn"] = old["since"] % old["gap"]
        tasks["best"] = rounded(np.maximum(old["best"], 0), SCORE_BITS)
        nll, targets = old["nll"], old["targets"]
        cost = np.divide(targets + nll, targets, out=np.zeros(len(old)), where=targets > 0)
        tasks["cost"] = rounded(np.minimum(cost, HUGE), self.cost_bits)
        return State(start, tasks)

    def _gaps(self, state: State, phases: slice) -> np.ndarray:
        """Gaps in force in each of some phases, [phases, tasks] int64."""
        gap = state.tasks["gap"].astype(np.int64)
        going = ((self.taken.shares[phases] > 0) & (gap == 1)).any(axis=1)
        return np.where(going[:, None], gap, 1)

    def _updates(self, state: State, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Updates of each task since the latest decision, and its samples in each; [phases, tasks] int64."""
        assert step >= state.start, "windows before a decision are not kept"
        taken, turn = self.taken, state.tasks["turn"].astype(np.int64)
        phases = slice(taken.phase(state.start), taken.phase(step) + 1)
        low = np.maximum(taken.starts[phases], state.start)[:, None]
        high = np.append(low[1:], step)[:, None]
        gaps = self._gaps(state, phases)
        # ceil((high - turn) / gap) less the same of low
        return (turn - low) // gaps - (turn - high) // gaps, taken.shares[phases]

    def _cursors(self, state: State, step: int) -> np.ndarray:
        updates, samples = self._updates(state, step)
        return state.tasks["cursor"] + (updates * samples).sum(axis=0)


def _bits(column: np.ndarray) -> np.ndarray:
    """The same memory as integers >= 0."""
    return column.view(f"<u{column.itemsize}")
