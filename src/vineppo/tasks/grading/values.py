"""Equality of formulas: exact for rational numbers, by values at many points for everything else.

Every operation checks the size of its result first, so that no comparison takes long: 9^{9^9} is refused, not computed.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from vineppo.tasks.grading.formulas import Node

MAX_BITS = 2**16
"""Largest size of a numerator or denominator. 2^{2005} and 1/2004! are far below it."""
MAX_REAL_BITS = 2**13
"""Largest total size of the rational numbers in a formula with irrational numbers, whose precision grows with it."""
_MAX_SCALE = 2**11
"""Largest total size in bits of the irrational constants of a formula, as e^{-1000}, that raises the precision."""
_MAX_EXPONENT = 2.0**20
"""Largest natural logarithm of an irrational number, and largest size in bits of the argument of a function."""
_NUM_POINTS = 8
_MIN_DIGITS = 60
_Number = Any
"""A Fraction, or a number of mpmath."""


class TooLarge(ValueError):
    """A number would be too large to be computed."""


class Undefined(ValueError):
    """The formula has no value at this point."""


def same_value(one: Node, other: Node) -> bool:
    """Return whether two formulas are equal: at all points where both are defined in the real numbers.

    Rational values are compared exactly. Other values are compared with more digits than the formulas contain, so that
    equal decimals or a small difference do not make two values equal: 1 - e^{-1000} is not 1. Differences of less than
    10^{-40} of the value are not seen in formulas with variables, and in long formulas with numbers such as e^{-1000}.
    Formulas that are too large to be computed are equal only if they are identical.
    """
    if one == other:
        return True
    variables = sorted(names(one) | names(other), key=repr)
    try:
        verdicts = [(_equal_at(one, other, point), _contains_i(one, other)) for point in _points(variables)]
    except TooLarge:
        return False
    return _judge(verdicts)


def _judge(verdicts: list[tuple[_Verdict, bool]]) -> bool:
    counted = [v for v, _ in verdicts if v.defined]
    if any(v.real_one != v.real_other for v in counted):
        return False
    real = [v for v in counted if v.real_one]
    # Where both formulas are not real, they are outside their domain: sqrt(1/n) and 1/sqrt(n) are equal.
    used = counted if not real or verdicts[0][1] else real
    return bool(used) and all(v.equal for v in used)


def same_up_to_factor(one: Node, other: Node) -> float | None:
    """Return the sign (1.0 or -1.0) of the constant c with one = c * other, or None if there is no such constant."""
    variables = sorted(names(one) | names(other), key=repr)
    if not variables:
        return None
    try:
        pairs = [pair for point in _points(variables) if (pair := _values(one, other, point)) is not None]
    except TooLarge:
        return None
    pairs = [pair for pair in pairs if pair[0] != 0 or pair[1] != 0]
    if len(pairs) < 2 or any(a == 0 or b == 0 for a, b, _ in pairs):
        return None
    context = _context()
    for (a, b, digits), (c, d, more) in itertools.pairwise(pairs):
        if not _close(a * d, c * b, min(digits, more)):
            return None
    ratio = context.mpmathify(_as_real(pairs[0][0])) / _as_real(pairs[0][1])
    if not _is_real(ratio, pairs[0][2]):
        return None
    return math.copysign(1.0, ratio.real)


def real_constant(node: Node) -> Any | None:
    """Return a number of mpmath with the value of a real constant, or None if the formula is no real constant."""
    if names(node):
        return None
    try:
        pair = _values(node, ("number", Fraction(0)), {})
    except TooLarge:
        return None
    if pair is None or not _is_real(pair[0], pair[2]):
        return None
    return _as_real(pair[0]).real


@dataclass(frozen=True)
class _Verdict:
    defined: bool
    equal: bool = False
    real_one: bool = False
    real_other: bool = False


def _equal_at(one: Node, other: Node, point: Mapping[Node, Fraction]) -> _Verdict:
    pair = _values(one, other, point)
    if pair is None:
        return _Verdict(False)
    a, b, digits = pair
    return _Verdict(True, _close(a, b, digits), _is_real(a, digits), _is_real(b, digits))


def _values(one: Node, other: Node, point: Mapping[Node, Fraction]) -> tuple[_Number, _Number, int] | None:
    """Return (value, value, number of digits in which they can be compared), or None if one is undefined."""
    try:
        first = _Evaluation(point, 30)
        a, b = first.value(one), first.value(other)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a, b, _MIN_DIGITS
        if first.bits > MAX_REAL_BITS:
            raise TooLarge
        scale = first.scale if not point and first.scale <= _MAX_SCALE else 0
        digits = _MIN_DIGITS + 2 * int((first.bits + scale) * math.log10(2))
        return _precise(one, point, digits), _precise(other, point, digits), digits - 20
    except (Undefined, ZeroDivisionError):
        return None
    except (OverflowError, RecursionError, MemoryError) as error:
        raise TooLarge from error


def _precise(node: Node, point: Mapping[Node, Fraction], digits: int) -> _Number:
    """Return a value with this number of digits. It is 0 if more digits only make it smaller."""
    short, long = (_Evaluation(point, n).value(node) for n in (digits, 2 * digits))
    if isinstance(long, Fraction):
        return long
    with _context().workdps(2 * digits):
        lost = abs(long - short) > abs(long) * _context().mpf(10) ** -(digits // 2)
    return Fraction(0) if lost else long


def _close(a: _Number, b: _Number, digits: int) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    context = _context()
    with context.workdps(3 * digits):
        a, b = _as_real(a), _as_real(b)
        return bool(abs(a - b) <= max(abs(a), abs(b)) * context.mpf(10) ** -digits)


def _is_real(value: _Number, digits: int) -> bool:
    if isinstance(value, Fraction):
        return True
    return bool(abs(value.imag) <= abs(value) * _context().mpf(10) ** -(digits // 2))


def _as_real(value: _Number) -> Any:
    if isinstance(value, Fraction):
        return _context().mpf(value.numerator) / value.denominator
    return value


@functools.cache
def _context() -> Any:
    import mpmath  # installed with sympy, which PyTorch needs

    return mpmath.MPContext()


def _points(variables: list[Node]) -> Iterator[dict[Node, Fraction]]:
    """Yield the points at which formulas are compared: small and large values, all positive in every second point."""
    if not variables:
        yield {}
        return
    generator = random.Random(0)
    for number in range(_NUM_POINTS):
        scale = (1, 3, 20, 300)[number // 2 % 4]
        point = {}
        for name in variables:
            value = Fraction(generator.randint(1, 96), 97) * scale
            point[name] = -value if number % 2 and generator.random() < 0.75 else value
        yield point


def names(node: Node) -> frozenset[Node]:
    """Return the variables of a formula. A value that is only known by its text counts as a variable."""
    if node[0] in ("name", "opaque"):
        return frozenset({node})
    return frozenset().union(*(names(part) for part in node[1:] if isinstance(part, tuple)))


def _contains_i(*nodes: Node) -> bool:
    return any(
        node == ("constant", "i") or _contains_i(*(part for part in node[1:] if isinstance(part, tuple)))
        for node in nodes
    )


@dataclass
class _Evaluation:
    """Computes the value of a formula at a point: a Fraction while all numbers are rational, else with `digits`."""

    point: Mapping[Node, Fraction]
    digits: int
    bits: int = field(default=0, init=False)
    """Total size of the rational numbers that were converted."""
    scale: int = field(default=0, init=False)
    """Total magnitude of the binary exponents of irrational powers and function values, at least 64 for each."""

    def value(self, node: Node) -> _Number:
        """Return the value of a formula. Raises Undefined, TooLarge or ZeroDivisionError if there is none."""
        with _context().workdps(self.digits):
            return self._value(node)

    def _value(self, node: Node) -> _Number:
        kind = node[0]
        if kind == "number":
            return _checked(node[1])
        if kind in ("name", "opaque"):
            return self.point[node]
        if kind == "constant":
            return self._constant(node[1])
        if kind == "call":
            return self._call(node[1], [self._value(argument) for argument in node[2:]])
        values = [self._value(part) for part in node[1:]]
        if kind == "+":
            return functools.reduce(self._add, values)
        if kind == "*":
            return functools.reduce(self._multiply, values)
        if kind == "neg":
            return -values[0]
        if kind == "/":
            return self._multiply(values[0], self._inverse(values[1]))
        return self._power(*values) if kind == "^" else self._root(*values)

    def _constant(self, name: str) -> _Number:
        context = _context()
        if name == "inf":
            raise Undefined
        return {"pi": +context.pi, "e": +context.e, "i": context.mpc(0, 1)}[name]

    def _real(self, value: _Number) -> _Number:
        """Convert a Fraction to a number of mpmath."""
        if not isinstance(value, Fraction):
            return value
        self.bits += value.numerator.bit_length() + value.denominator.bit_length()
        return _as_real(value)

    def _add(self, a: _Number, b: _Number) -> _Number:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return _checked(a + b)
        return self._real(a) + self._real(b)

    def _multiply(self, a: _Number, b: _Number) -> _Number:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return _checked(a * b)
        return self._real(a) * self._real(b)

    def _inverse(self, value: _Number) -> _Number:
        return 1 / value

    def _power(self, base: _Number, exponent: _Number) -> _Number:
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            if isinstance(base, Fraction):
                size = max(base.numerator.bit_length(), base.denominator.bit_length())
                if abs(base) != 1 and size * abs(exponent) > MAX_BITS:
                    raise TooLarge
                return base ** (exponent.numerator % 2 if abs(base) == 1 else exponent.numerator)
            if abs(exponent) > _MAX_EXPONENT:
                raise TooLarge
        base, exponent = self._real(base), self._real(exponent)
        if base == 0:
            if exponent.imag or exponent.real <= 0:
                raise Undefined
            return base
        if abs(_context().log(base)) * abs(exponent) > _MAX_EXPONENT:
            raise TooLarge
        return self._scaled(base**exponent)

    def _root(self, value: _Number, degree: _Number) -> _Number:
        if not (isinstance(degree, Fraction) and degree.denominator == 1 and 2 <= degree <= MAX_REAL_BITS):
            return self._power(value, self._inverse(degree))
        if isinstance(value, Fraction) and (exact := _exact_root(value, int(degree))) is not None:
            return exact
        value = self._real(value)
        if degree % 2 and not _context().im(value) and _context().re(value) < 0:  # the real root of a negative number
            return -_context().root(-value, int(degree))
        return _context().root(value, int(degree))

    def _call(self, name: str, arguments: list[_Number]) -> _Number:
        if all(isinstance(a, Fraction) for a in arguments) and name in _EXACT:
            exact = _EXACT[name](*arguments)
            if exact is not None:
                return _checked(Fraction(exact))
        values = [self._real(a) for a in arguments]
        if any(value and _context().mag(value) > math.log2(_MAX_EXPONENT) for value in values):
            raise TooLarge
        if name == "tanh":  # it differs from 1 by about 2e^{-2|x|}
            self._scaled(_context().exp(-2 * abs(values[0])))
        return self._scaled(_real_function(name, values))

    def _scaled(self, value: _Number) -> _Number:
        """Return an irrational value, and record its size, which the precision must cover."""
        size = _context().mag(value)
        if isinstance(size, int):  # not for 0 and infinity
            self.scale += max(64, abs(size))
        return value


def _real_function(name: str, values: list[_Number]) -> _Number:
    context = _context()
    if name == "abs":
        return abs(values[0])
    if name == "log":
        return context.log(*values) if len(values) == 2 else context.log10(values[0])
    if name == "double factorial":
        return context.fac2(values[0])
    table = {"ln": "log", "factorial": "factorial", "ceiling": "ceil"}
    table |= {f"arc{short}": f"a{short}" for short in ("sin", "cos", "tan", "cot", "sec", "csc")}
    try:
        return getattr(context, table.get(name, name))(*values)
    except ValueError as error:  # a pole
        raise Undefined from error


def _checked(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooLarge
    return value


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """Return the rational root of a rational number, or None if the root is not rational."""
    if value < 0 and degree % 2 == 0:
        return None
    roots = [_whole_root(abs(value.numerator), degree), _whole_root(value.denominator, degree)]
    if roots[0] is None or roots[1] is None:
        return None
    return Fraction(roots[0] if value > 0 else -roots[0], roots[1])


def _whole_root(value: int, degree: int) -> int | None:
    """Return the root of a whole number if it is a whole number."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    if degree == 2:
        root = math.isqrt(value)
        return root if root * root == value else None
    while low < high:
        middle = (low + high) // 2
        if middle**degree < value:
            low = middle + 1
        else:
            high = middle
    return low if low**degree == value else None


def _factorial(value: Fraction) -> int | None:
    if value.denominator != 1 or value < 0:
        return None
    if value * max(1, int(value).bit_length()) > MAX_BITS * 1.2:
        raise TooLarge
    return math.factorial(int(value))


def _double_factorial(value: Fraction) -> int | None:
    if value.denominator != 1 or value < 0:
        raise Undefined
    if value * max(1, int(value).bit_length()) > 2 * MAX_BITS:
        raise TooLarge
    return math.prod(range(int(value), 0, -2))


def _binomial(n: Fraction, k: Fraction) -> int | None:
    if n.denominator != 1 or k.denominator != 1 or n < 0 or k < 0:
        return None
    if min(k, n - k) * n.numerator.bit_length() > MAX_BITS:
        raise TooLarge
    return math.comb(int(n), int(k))


_EXACT: dict[str, Callable[..., Fraction | int | None]] = {
    "abs": abs,
    "floor": math.floor,
    "ceiling": math.ceil,
    "factorial": _factorial,
    "double factorial": _double_factorial,
    "binomial": _binomial,
}
