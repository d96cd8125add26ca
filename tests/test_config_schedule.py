"""Mixtures, phases and controllers in a recipe: what is refused, and what the plan makes of the rest."""

import copy

import pytest

from dsvlm import config_schedule
from dsvlm.config import apply_override, parse_recipe
from dsvlm.schedule.controller import CONTROLLERS, StopAndGo
from dsvlm.schedule.mixture import Phase
from dsvlm.schedule.plan import STRATEGIES, Schedule, Stream
from dsvlm.schedule.shares import LONGEST_CYCLE
from dsvlm.train.build import make_controller, phase_table
from tests.dist.recipes import DECODERS, RAW

SIZES = [400, 100, 36, 4]  # samples of lines, question, locate, match; their windows hold 5, 6, 4 and 3
UNIFIED = ("schedule.strategy=unified", "schedule.samples=8")


def phases(*starts, shares="lines: 1, question: 0, locate: 2, match: 0"):
    listed = ", ".join(f"{{start: {start}, shares: {{{shares}}}}}" for start in starts)
    return f"phases=[{listed}]"


@pytest.fixture
def recipe():
    """`recipe(override, ...)`: the tiny recipe with changes."""

    def change(*overrides):
        raw = copy.deepcopy(RAW)
        raw["model"]["decoder"]["config"] = dict(DECODERS["opt"])
        raw["schedule"]["steps"] = 100
        for override in overrides:
            apply_override(raw, override)
        return parse_recipe(raw)

    return change


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["mixture={kind: proportinal}"], ["mixture.kind", "did you mean 'proportional'"]),
        (["mixture={kind: temperature, alpha: 1.5}"], ["mixture.alpha", "1.5", "between 0.0 and 1.0"]),
        (["mixture={kind: annealed, alpha: .nan}"], ["mixture.alpha", "nan"]),
        (["mixture={kind: annealed, parts: 1}"], ["mixture.parts", "1", "between 2"]),
        (["mixture={kind: annealed, parts: 101}"], ["mixture.parts", "101", "schedule.steps (100)"]),
        (["mixture={kind: proportional, cycle: 50}"], ["mixture.cycle", "accumulate", "remove it"]),
        ([*UNIFIED, "mixture={kind: proportional, cycle: 3}"], ["mixture.cycle", "3", "between 4"]),
        ([*UNIFIED, "mixture={kind: proportional, cycle: 99999999}"], ["mixture.cycle", "99999999", "65536"]),
        (["mixture={kind: proportional, points: {lines: '0:1'}}"], ["mixture.points", "piecewise", "proportional"]),
        (["mixture={kind: piecewise}"], ["mixture.points", "missing", "0:0,1000:0,2000:1"]),
        (["mixture={kind: piecewise, points: {line: '0:1'}}"], ["points.line", "did you mean 'lines'"]),
        (["mixture={kind: piecewise, points: {lines: '0=1'}}"], ["points.lines", "'0=1'", "step:value"]),
        (["mixture={kind: piecewise, points: {lines: '0:1,'}}"], ["points.lines", "'0:1,'"]),
        (["mixture={kind: piecewise, points: {lines: '0:-1'}}"], ["points.lines", "'0:-1'"]),
        (["mixture={kind: piecewise, points: {lines: 1:30}}"], ["points.lines", "90", "in quotes"]),
        (["mixture={kind: piecewise, points: {lines: '5:1,5:2'}}"], ["points.lines", "5, 5", "ascend"]),
        (["mixture={kind: proportional}", phases(0)], ["phases", "mixture", "two"]),
        ([phases(0, shares="lines: 1, question: 1, locate: 1, mach: 1")], ["mach", "did you mean 'match'"]),
        ([phases(0, shares="lines: 1, question: 1, locate: 1")], ["shares.match", "missing", "pause"]),
        ([phases(0, shares="lines: 0, question: 0, locate: 0, match: 0")], ["sum of", "0", "between 1"]),
        ([phases(0, shares="lines: -1, question: 0, locate: 0, match: 9")], ["shares.lines", "-1"]),
        ([phases(-1)], ["phases[0].start", "-1", "at least 0"]),
        ([phases(100)], ["phases[0].start", "100", "below schedule.steps"]),
        ([phases(7, 7)], ["[1].start", "above 7"]),
        ([*UNIFIED, "tasks.lines.quota=2097152"], ["tasks.*.quota", "2097165", "2097152", "unified", "divide"]),
        ([*UNIFIED, "tasks.lines.samples=2097152"], ["tasks.*.quota", "the task's samples"]),
        ([*UNIFIED, "tasks.lines.quota=2097152", phases(1)], ["tasks.*.quota", "2097165"]),
        (["controller={kind: stop_and_go, every: 2147483649}"], ["controller.every", "at most"]),
        (["controller={kind: stop_and_goo}"], ["controller.kind", "did you mean 'stop_and_go'"]),
        ([*UNIFIED, "controller={kind: stop_and_go}"], ["schedule.controller", "unified", "accumulate or mixed"]),
        (["controller={kind: stop_and_go, every: 0}"], ["controller.every", "0", "at least 1"]),
        (["controller={kind: stop_and_go, gap: 1}"], ["controller.gap", "1", "between 2"]),
        (["controller={kind: stop_and_go, gain: -0.1}"], ["controller.gain", "-0.1"]),
        (["controller={kind: stop_and_go, loss: 5}"], ["controller.loss", "5.0"]),
        (["controller={kind: stop_and_go, patience: 99999}"], ["controller.patience", "99999"]),
        (["controller={kind: stop_and_go, cooldown: -1}"], ["controller.cooldown", "-1"]),
    ],
)
def test_refusals(recipe, overrides, words):
    with pytest.raises(ValueError) as error:
        recipe(*(text if text.startswith(("schedule.", "tasks.")) else f"schedule.{text}" for text in overrides))
    assert all(word in str(error.value) for word in words), error.value


def test_quotas_that_no_step_draws_by_may_be_large(recipe):
    quota = "tasks.lines.quota=65533"
    for overrides in ((), (*UNIFIED, "schedule." + phases(0)), (*UNIFIED, "schedule.mixture={kind: temperature}")):
        assert recipe(quota, *overrides).tasks["lines"].quota == 65533
    recipe(*UNIFIED, "tasks.lines.quota=65523")


def test_tasks_may_be_more_than_the_slots_of_a_cycle_that_is_not_given(recipe):
    tasks = ", ".join(f"t{i}: {{type: vqa, shards: train/lines, samples: 2}}" for i in range(101))
    many = f"tasks={{{tasks}}}"
    with pytest.raises(ValueError, match="schedule.mixture.cycle: 100 must be between 101 and 65536"):
        recipe(many, *UNIFIED, "schedule.mixture={kind: temperature}")
    recipe(many, *UNIFIED, "schedule.mixture={kind: temperature, cycle: 101}")
    for kind in ("{kind: proportional}", "{kind: piecewise, points: {t0: '0:1'}}"):
        recipe(many, *UNIFIED, f"schedule.mixture={kind}")
    recipe(many, "schedule.mixture={kind: temperature}")


def test_names_and_limits_agree():
    """The checks stand left of the schedule and may not import it."""
    assert config_schedule.CONTROLLERS == tuple(CONTROLLERS)
    assert config_schedule.LONGEST_CYCLE == LONGEST_CYCLE
    for strategy in STRATEGIES:
        streams = (Stream("a", (8,), 1, 1),)
        assert Schedule(0, strategy, streams, samples=1, chunk=1).cyclic == (strategy in config_schedule.DRAWN)


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        ((), ()),
        (UNIFIED, ()),
        # What comes to the tasks' own shares is a schedule without phases, and keeps its identity.
        (("schedule.mixture={kind: piecewise, points: {lines: '0:1'}}",), ()),
        (("schedule." + phases(0, shares="lines: 5, question: 6, locate: 4, match: 3"),), ()),
        # Windows of 18 samples: 13.33, 3.33, 1.2 and 0.13 of them, but one at least.
        (("schedule.mixture={kind: proportional}",), (Phase(0, (13, 3, 1, 1)),)),
        ((*UNIFIED, "schedule.mixture={kind: proportional}"), (Phase(0, (50, 13, 5, 1)),)),  # batches of 8 in an epoch
        ((*UNIFIED, "schedule.mixture={kind: proportional, cycle: 27}"), (Phase(0, (19, 5, 2, 1)),)),
        ((*UNIFIED, "schedule.mixture={kind: temperature}"), (Phase(0, (53, 26, 16, 5)),)),  # roots 20, 10, 6, 2
        (
            ("schedule.strategy=per_rank", "schedule.samples=12", "schedule.chunk=4",
             "schedule.mixture={kind: annealed, alpha: 0, parts: 2, cycle: 20}"),
            (Phase(0, (14, 4, 1, 1)), Phase(50, (5, 5, 5, 5))),
        ),
        (
            ("schedule.mixture={kind: piecewise, parts: 4, points: {lines: '0:0,25:0,49:2', locate: '99:0'}}",),
            (Phase(0, (0, 12, 0, 6)), Phase(25, (6, 8, 0, 4)), Phase(50, (9, 6, 0, 3))),
        ),
        (("schedule." + phases(9),), (Phase(0, (5, 6, 4, 3)), Phase(9, (1, 0, 2, 0)))),
        (("schedule." + phases(0, 9),), (Phase(0, (1, 0, 2, 0)),)),
    ],
)  # fmt: skip
def test_phase_table(recipe, overrides, wanted):
    assert phase_table(recipe(*overrides), SIZES) == wanted


def test_controllers_have_the_recipes_settings(recipe):
    assert make_controller(recipe()) is None
    made = make_controller(recipe("schedule.controller={kind: stop_and_go, every: 7, gap: 3, patience: 2}"))
    assert made == StopAndGo(every=7, gap=3, patience=2, gain=0.001, loss=0.005, cooldown=1)


def test_mixtures_are_part_of_the_identity(recipe):
    """Each of the fields changes what the run is; left out, the identity is that of runs older than they are."""
    changes = (
        "mixture={kind: proportional}", "mixture={kind: temperature}", "mixture={kind: temperature, alpha: 0.4}",
        phases(9), "controller={kind: stop_and_go}",
        "controller={kind: stop_and_go, gap: 5}",
    )  # fmt: skip
    hashes = {recipe(f"schedule.{change}").identity_hash() for change in changes} | {recipe().identity_hash()}
    assert len(hashes) == 7
    assert not {"schedule.mixture", "schedule.phases", "schedule.controller"} & set(recipe().identity())
