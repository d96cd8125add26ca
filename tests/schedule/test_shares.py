"""Shares of tasks: integers that add up, as near to the weights as integers can be, the same on every machine."""

from fractions import Fraction

import pytest
from hypothesis import Phase as HypothesisPhase
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvlm.schedule import shares
from dsvlm.schedule.mixture import Phase
from dsvlm.schedule.shares import annealed_alpha, largest_remainder, power, value_at

steady = settings(derandomize=True, deadline=None, database=None, phases=[HypothesisPhase.generate], max_examples=200)
GLUE = [393_000, 364_000, 105_000, 67_000, 8_500, 7_000, 3_700, 2_500]  # samples of eight tasks
RAMP = ((0, Fraction(0)), (1000, Fraction(0)), (2000, Fraction(1)))


@steady
@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=12), st.integers(1, 500))
def test_largest_remainder(weights, total):
    positive = sum(weight > 0 for weight in weights)
    if not 0 < positive <= total:
        with pytest.raises(ValueError, match="cannot be shared"):
            largest_remainder(weights, total)
        return
    split = largest_remainder(weights, total)
    assert sum(split) == total
    raised = 0  # tasks that get 1 for less; the others share what is left
    for weight, share in zip(weights, split, strict=True):
        assert (share >= 1) == (weight > 0)
        raised += 0 < Fraction(weight * total, sum(weights)) < 1
    for weight, share in zip(weights, split, strict=True):
        exact = Fraction(weight * total, sum(weights))
        assert share < max(exact, 1) + 1 if raised else abs(share - exact) < 1
    by_weight = [share for _, share in sorted(zip(weights, split, strict=True))]
    assert by_weight == sorted(by_weight)


def test_largest_remainder_by_hand():
    assert largest_remainder([3, 3, 1], 10) == (4, 4, 2)
    assert largest_remainder([1, 1, 1], 4) == (2, 1, 1)
    assert largest_remainder([10**6, 1, 1], 10) == (8, 1, 1)
    assert largest_remainder([50, 49, 1], 3) == (1, 1, 1)
    assert largest_remainder([Fraction(1, 3), 0, Fraction(2, 3)], 9) == (3, 0, 6)


def test_powers_are_exact_or_rounded_alike():
    assert power(393_000, Fraction(1)) == 393_000 and power(393_000, Fraction(0)) == 1
    assert abs(power(10_000, Fraction(1, 2)) - 100) < Fraction(1, 10**35)
    # e(0.3 * l(2)) of `bc -l`, to 40 digits
    assert power(2, Fraction(3, 10)) == Fraction("1.231144413344916284499393069167743109876")


@pytest.mark.parametrize(
    "part, wanted",
    [
        (0, [0.4134, 0.3829, 0.1104, 0.0705, 0.0089, 0.0074, 0.0039, 0.0026]),
        (4, [0.1952, 0.1922, 0.1499, 0.1370, 0.0907, 0.0872, 0.0768, 0.0710]),
    ],
)
def test_annealed_as_published(part, wanted):
    """Stickland & Murray's probabilities of the first and the last of 5 epochs (alpha 0.2 at the end)."""
    weights = [power(size, annealed_alpha(0.2, part, 5)) for size in GLUE]
    assert [round(float(weight / sum(weights)), 4) for weight in weights] == wanted


def test_annealed_phases():
    phases = shares.annealed(GLUE, 0.2, 10_000, 500, 5)
    assert [phase.start for phase in phases] == [0, 100, 200, 300, 400]
    assert phases[0].shares == (4134, 3829, 1104, 705, 89, 74, 39, 26) == shares.fixed(GLUE, 10_000)[0].shares
    assert phases[2].shares == (3276, 3129, 1484, 1133, 329, 292, 199, 158)
    assert phases[4].shares == (1952, 1922, 1499, 1370, 907, 872, 768, 710)
    assert all(sum(phase.shares) == 10_000 for phase in phases)
    for earlier, later in zip(phases, phases[1:], strict=False):
        assert later.shares[0] < earlier.shares[0] and later.shares[-1] > earlier.shares[-1]
    # Equal sizes have equal shares at any exponent: nothing changes, so there is one phase.
    assert shares.annealed([50, 50], 0.2, 8, 500, 5) == (Phase(0, (4, 4)),)


def test_temperature_lies_between_uniform_and_proportional():
    by_alpha = [shares.temperature(GLUE, alpha, 800)[0].shares for alpha in (0.0, 0.3, 0.5, 0.8, 1.0)]
    assert by_alpha[0] == (100,) * 8 and by_alpha[-1] == shares.fixed(GLUE, 800)[0].shares
    assert [split[0] for split in by_alpha] == sorted(split[0] for split in by_alpha)
    assert by_alpha[2] == (239, 230, 123, 99, 35, 32, 23, 19)  # 800 times the roots over their sum, 2099.79


def test_value_at():
    wanted = {0: 0, 1000: 0, 1500: Fraction(1, 2), 2000: 1, 9999: 1}
    assert {step: value_at(RAMP, Fraction(step)) for step in wanted} == wanted
    assert value_at(((10, Fraction(3)),), Fraction(0)) == 3


def test_piecewise_phases():
    """A task that is off for 1,000 updates, then rises to its own share; sampled in the middle of parts."""
    phases = shares.piecewise(("caption", "vqa"), (10, 30), {"caption": RAMP}, 40, 3000, 6)
    assert phases == (
        Phase(0, (0, 40)), Phase(1000, (3, 37)), Phase(1500, (8, 32)), Phase(2000, (10, 30)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="all are 0 at steps 0 to 499"):
        shares.piecewise(("caption",), (10,), {"caption": RAMP}, 40, 3000, 6)


@pytest.mark.parametrize("curve", [((0, 1), (249, 0)), ((0, 0), (260, 0), (400, 5), (700, 0)), ((2750, 0), (2999, 1))])
def test_a_curve_that_no_part_sees_is_refused(curve):
    """With the 500 updates of a part it would be as if the task were not there; of 20, its share is above 0 in some."""
    curve = {"caption": tuple((step, Fraction(value)) for step, value in curve)}
    with pytest.raises(ValueError, match="points.caption: above 0, .* would never train; a part is 500 steps: raise"):
        shares.piecewise(("caption", "vqa"), (10, 30), curve, 40, 3000, 6)
    assert any(phase.shares[0] for phase in shares.piecewise(("caption", "vqa"), (10, 30), curve, 40, 3000, 150))
    off = shares.piecewise(("caption", "vqa"), (10, 30), {"caption": ((0, Fraction(0)), (3000, Fraction(1)))}, 40, 1, 1)
    assert off == (Phase(0, (0, 40)),), "0 throughout the run is what is asked for"


def test_a_cycle_is_one_shuffle_of_all_batches():
    assert shares.epoch_quotas([100, 33, 1], 32) == (4, 2, 1)
    capped = shares.epoch_quotas([10**9, 10**8, 5], 1)
    assert sum(capped) == shares.LONGEST_CYCLE and capped[2] == 1 and abs(capped[0] - 10 * capped[1]) < 10
