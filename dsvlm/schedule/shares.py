"""From weights of tasks to integer shares: proportional, temperature, annealed and piecewise mixtures as phases.

Weights are exact, or decimals rounded the same way everywhere (`exp` and `ln` of the decimal module are correctly
rounded, floating-point powers are not): every machine gets the same integers.
"""

import decimal
from collections.abc import Sequence
from fractions import Fraction

from dsvlm.schedule.mixture import Phase

LONGEST_CYCLE = 65_536  # slots; a whole cycle is drawn at once

Curve = Sequence[tuple[int, Fraction]]  # (step, value), ascending; linear in between, constant outside


def largest_remainder(weights: Sequence[Fraction | int], total: int) -> tuple[int, ...]:
    """Split `total` in proportion to weights (>= 0) by largest remainders; a positive weight gets at least 1.

    Of equal remainders the first are rounded up. Raises ValueError when `total` has not 1 for each positive weight.
    """
    shares = [0] * len(weights)
    left = {index: Fraction(weight) for index, weight in enumerate(weights) if weight > 0}
    if not 0 < len(left) <= total:
        raise ValueError(f"{total} cannot be shared by {len(left)} tasks: each of them needs at least 1")
    while few := [index for index, weight in left.items() if weight * total < sum(left.values())]:
        for index in few:  # its part is below 1: it gets 1, the others share the rest
            shares[index] = 1
            del left[index]
        total -= len(few)
    unit = total / sum(left.values())
    parts = {index: divmod(weight * unit, 1) for index, weight in left.items()}
    missing = total - sum(whole for whole, _ in parts.values())
    order = sorted(parts, key=lambda index: (-parts[index][1], index))
    for place, index in enumerate(order):
        shares[index] = int(parts[index][0]) + (place < missing)
    return tuple(shares)


def power(size: int, alpha: Fraction) -> Fraction:
    """size^alpha (0 <= alpha <= 1) to 40 digits; exact for 0 and 1."""
    if alpha in (0, 1):
        return Fraction(size) ** int(alpha)
    digits = decimal.Context(prec=40)
    exponent = digits.divide(decimal.Decimal(alpha.numerator), decimal.Decimal(alpha.denominator))
    return Fraction(digits.exp(digits.multiply(exponent, digits.ln(decimal.Decimal(size)))))


def annealed_alpha(alpha: float, part: int, parts: int) -> Fraction:
    """Exponent of one part of a run: it falls linearly from 1 to `alpha` (Stickland & Murray 2019: to 0.2)."""
    return 1 - (1 - Fraction(str(alpha))) * Fraction(part, parts - 1)


def value_at(curve: Curve, step: Fraction) -> Fraction:
    """Value of a piecewise linear curve at a step."""
    if step <= curve[0][0]:
        return curve[0][1]
    for (low, left), (high, right) in zip(curve, curve[1:], strict=False):
        if step <= high:
            return left + (right - left) * (step - low) / (high - low)
    return curve[-1][1]


def epoch_quotas(sizes: Sequence[int], chunk: int) -> tuple[int, ...]:
    """Chunks in one epoch of each task: a cycle is one shuffle of all batches of all tasks (MT-DNN, Liu et al. 2019).

    Where that is more than LONGEST_CYCLE, in the same proportions.
    """
    quotas = tuple(-(-size // chunk) for size in sizes)
    return quotas if sum(quotas) <= LONGEST_CYCLE else largest_remainder(quotas, LONGEST_CYCLE)


def fixed(weights: Sequence[Fraction | int], total: int) -> tuple[Phase, ...]:
    """One phase with shares in proportion to weights."""
    return (Phase(0, largest_remainder(weights, total)),)


def temperature(sizes: Sequence[int], alpha: float, total: int) -> tuple[Phase, ...]:
    """One phase with shares in proportion to size^alpha: 1 is proportional, 0 uniform."""
    return fixed([power(size, Fraction(str(alpha))) for size in sizes], total)


def annealed(sizes: Sequence[int], alpha: float, total: int, steps: int, parts: int) -> tuple[Phase, ...]:
    """As many phases as parts: shares in proportion to size^a, a falling from 1 to `alpha`."""
    exponents = [annealed_alpha(alpha, part, parts) for part in range(parts)]
    shares = [largest_remainder([power(size, exponent) for size in sizes], total) for exponent in exponents]
    return merged([Phase(part * steps // parts, share) for part, share in enumerate(shares)])


def piecewise(
    names: Sequence[str], own: Sequence[int], curves: dict[str, Curve], total: int, steps: int, parts: int
) -> tuple[Phase, ...]:
    """Phases in which each task's own share is multiplied by its curve's value in the middle of the part.

    A task without a curve keeps its own share. Raises ValueError when all tasks are 0 somewhere, and when a curve is
    above 0 between the middles of parts alone, so that its task has no share in any.
    """
    phases = []
    for part in range(parts):
        start, stop = part * steps // parts, (part + 1) * steps // parts
        middle = Fraction(start + stop - 1, 2)
        factors = [value_at(curves[name], middle) if name in curves else Fraction(1) for name in names]
        if not any(factors):
            raise ValueError(f"schedule.mixture.points: all are 0 at steps {start} to {stop - 1}; raise one of them")
        weights = [share * factor for share, factor in zip(own, factors, strict=True)]
        phases.append(Phase(start, largest_remainder(weights, total)))
    for name, curve in curves.items():
        told = any(value_at(curve, Fraction(step)) for step in (0, steps - 1, *dict(curve)) if step < steps)
        if told and not any(phase.shares[names.index(name)] for phase in phases):
            raise ValueError(
                f"schedule.mixture.points.{name}: above 0, but in the middle of none of the {parts} parts of the run, "
                f"so {name} would never train; a part is {steps // parts} steps: raise schedule.mixture.parts"
            )
    return merged(phases)


def merged(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """The same phases without those that change nothing."""
    return tuple(
        phase for index, phase in enumerate(phases) if not index or phase.shares != phases[index - 1].shares
    )
