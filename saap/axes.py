"""Axes of charts: from values to places between 0 and 1, and ticks with labels."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

LOG_FROM = 20.0  # a range that spans more than this factor is drawn on a logarithmic axis
MOST_DECADES = 9.0  # values further below the largest are drawn at the lower edge
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic range; values outside of it are drawn at its edge."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float]) -> "Axis":
        """The axis that shows ``values``, logarithmic when none is negative and they span decades."""
        ordered = sorted(values)
        low, high = ordered[0], ordered[-1]
        if low >= 0 and high > 0:
            least = next(value for value in ordered if value > 0)
            if high / least > LOG_FROM:
                return cls(max(least, high / 10**MOST_DECADES), high, log=True)
        if low == high:
            pad = abs(low) / 10 or 1.0
            return cls(low - pad, high + pad)
        return cls(low, high)

    def place(self, value: float) -> float:
        """Where ``value`` lies: 0 at the low end, 1 at the high end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def value(self, place: float) -> float:
        """The inverse of ``place``."""
        if self.log:
            return self.low * (self.high / self.low) ** place
        return self.low + place * (self.high - self.low)

    def padded(self, share: float = 0.04) -> "Axis":
        """The same axis with room at both ends, for marks that have a size."""
        return Axis(self.value(-share), self.value(1 + share), self.log)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """At most ``most`` round values as (place, label), low to high."""
        values = _log_ticks(self.low, self.high, most) if self.log else _linear_ticks(self.low, self.high, most)
        return [(self.place(value), number(value)) for value in values]


def whole_ticks(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers 0 .. count - 1, a round step apart."""
    return list(range(0, count, max(1, math.ceil(_round_step(count / most)))))


def number(value: float) -> str:
    """A short label: plain near one, a power of ten far from it."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    power = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    return power if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}·{power}"


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    step = _round_step((high - low) / (most - 1))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, every few decades if there are many; 1, 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [power for power in range(first, last + 1) if low <= 10.0**power <= high]
    if len(powers) >= 3:
        step = -(-len(powers) // most)
        return [10.0**power for power in powers if power % step == 0]
    fine = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    return [value for value in fine if low <= value <= high][:most]
