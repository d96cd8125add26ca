"""Checks of a recipe's mixture, phases and controller: what can be known wrong before the manifests are read."""

import re
from collections.abc import Collection
from fractions import Fraction

from dsvlm.config import Recipe, nearest
from dsvlm.config_checks import at_least, counted, one_of, within

MIXTURES = ("proportional", "temperature", "annealed", "piecewise")
CONTROLLERS = ("stop_and_go",)
DRAWN = ("unified", "per_rank")
LONGEST_CYCLE = 65_536  # slots: a cycle is drawn at once
LARGEST_QUOTAS = 2**21  # slots of tasks' own quotas, which may be sizes of data sets; drawing them takes a second
CYCLE = 100  # slots of a mixture's cycle that is not given
MOST_PARTS = 1000
LARGEST_COUNT = 60_000  # of a controller's counters and gaps


def check_shares(recipe: Recipe) -> None:
    """Raises one ValueError naming the path, the value found and what to change."""
    options = recipe.schedule
    if options.mixture and options.phases:
        raise ValueError(
            "schedule.phases: schedule.mixture already says what each step's shares are; remove one of the two"
        )
    if options.mixture:
        check_mixture(recipe)
    check_phases(recipe)
    check_quotas(recipe)
    if options.controller:
        check_controller(recipe)


def check_mixture(recipe: Recipe) -> None:
    mixture, steps = recipe.schedule.mixture, recipe.schedule.steps
    one_of("schedule.mixture.kind", mixture.kind, MIXTURES)
    within("schedule.mixture.alpha", mixture.alpha, 0.0, 1.0)
    if mixture.kind in ("annealed", "piecewise"):
        least = 2 if mixture.kind == "annealed" else 1
        within("schedule.mixture.parts", mixture.parts, least, MOST_PARTS)
        if mixture.parts > steps:
            raise ValueError(
                f"schedule.mixture.parts: {mixture.parts} parts of schedule.steps ({steps}); use at most as many"
            )
    if mixture.cycle and recipe.schedule.strategy not in DRAWN:
        raise ValueError(
            f"schedule.mixture.cycle: strategy {recipe.schedule.strategy} has no cycles, its shares are samples of a "
            f"window; remove it, or use one of {', '.join(DRAWN)}"
        )
    if mixture.cycle or (recipe.schedule.strategy in DRAWN and mixture.kind in ("temperature", "annealed")):
        within("schedule.mixture.cycle", mixture.cycle or CYCLE, len(recipe.tasks), LONGEST_CYCLE)
    if mixture.points and mixture.kind != "piecewise":
        raise ValueError(f"schedule.mixture.points: only kind piecewise has points; remove them from {mixture.kind}")
    if mixture.kind == "piecewise":
        if not mixture.points:
            raise ValueError('schedule.mixture.points: missing; for example {TASK: "0:0,1000:0,2000:1"}')
        known_tasks("schedule.mixture.points", mixture.points, recipe)
        for name, text in mixture.points.items():
            parse_points(f"schedule.mixture.points.{name}", text)


def parse_points(path: str, text) -> tuple[tuple[int, Fraction], ...]:
    """Points of a piecewise linear curve from "step:value,step:value,...", steps ascending."""
    form = f'{path}: {text!r} is not of the form "step:value,...", for example "0:0,1000:0,2000:1" (in quotes)'
    if not isinstance(text, str):
        raise ValueError(form)
    points = []
    for part in text.replace(" ", "").split(","):
        found = re.fullmatch(r"(\d{1,15}):(\d{1,9}(?:\.\d{1,9})?)", part)
        if not found:
            raise ValueError(form)
        points.append((int(found[1]), Fraction(found[2])))
    steps = [step for step, _ in points]
    if steps != sorted(set(steps)):
        raise ValueError(f"{path}: the steps {', '.join(map(str, steps))} must ascend")
    return tuple(points)


def check_phases(recipe: Recipe) -> None:
    before = -1
    for index, phase in enumerate(recipe.schedule.phases):
        path = f"schedule.phases[{index}]"
        if not before < phase.start < recipe.schedule.steps:
            least = "at least 0" if index == 0 else f"above {before}, where the phase before it starts,"
            raise ValueError(f"{path}.start: {phase.start} must be {least} and below schedule.steps")
        before = phase.start
        known_tasks(f"{path}.shares", phase.shares, recipe)
        for name in recipe.tasks:
            if name not in phase.shares:
                raise ValueError(f"{path}.shares.{name}: missing; give the share of every task, 0 to pause it")
            at_least(f"{path}.shares.{name}", phase.shares[name], 0)
        within(f"sum of {path}.shares", sum(phase.shares.values()), 1, 2**31)
        if recipe.schedule.strategy in DRAWN:
            within(f"sum of {path}.shares, a cycle,", sum(phase.shares.values()), 1, LONGEST_CYCLE)


def check_quotas(recipe: Recipe) -> None:
    """The tasks' own quotas, where a run or its first part is shared out by them."""
    options = recipe.schedule
    if options.strategy not in DRAWN or options.mixture or (options.phases and options.phases[0].start == 0):
        return
    total = sum(task.quota or task.samples for task in recipe.tasks.values())
    if total > LARGEST_QUOTAS:
        raise ValueError(
            f"tasks.*.quota: {total} in all are more slots than a cycle of strategy {options.strategy} may have "
            f"({LARGEST_QUOTAS}); divide all by the same number (a quota that is not given is the task's samples)"
        )


def check_controller(recipe: Recipe) -> None:
    controller, strategy = recipe.schedule.controller, recipe.schedule.strategy
    one_of("schedule.controller.kind", controller.kind, CONTROLLERS)
    if strategy in DRAWN:
        raise ValueError(
            f"schedule.controller: strategy {strategy} draws one task after another, and a controller leaves tasks out "
            "of windows that hold all of them; use strategy accumulate or mixed"
        )
    counted("schedule.controller.every", controller.every, 1)
    within("schedule.controller.gap", controller.gap, 2, LARGEST_COUNT)
    within("schedule.controller.patience", controller.patience, 0, LARGEST_COUNT)
    within("schedule.controller.cooldown", controller.cooldown, 0, LARGEST_COUNT)
    within("schedule.controller.gain", controller.gain, 0.0, 1.0)
    within("schedule.controller.loss", controller.loss, 0.0, 1.0)


def known_tasks(path: str, names: Collection[str], recipe: Recipe) -> None:
    for name in names:
        if name not in recipe.tasks:
            raise ValueError(
                f"{path}.{name}: no such task{nearest(str(name), recipe.tasks)}; tasks: {', '.join(recipe.tasks)}"
            )
