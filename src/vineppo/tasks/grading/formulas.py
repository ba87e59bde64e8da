"""A parser of formulas in LaTeX: numbers, variables, elementary functions. It evaluates nothing.

The parser reads every formula in linear time and refuses what has no usual meaning, such as `2 3`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

Node = tuple[Any, ...]
"""(kind, arguments...). Kinds: number, constant, name, +, neg, *, /, ^, root, call, opaque. A call has the name of the
function and its arguments. An opaque node stands for a value that is only known by its text, such as `f(2)`."""
MAX_DEPTH = 40
"""Largest number of parts inside each other. Deeper formulas are refused, because the parser is recursive."""

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\S")
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa",
    "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma",
    "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega", "ell", "angle", "triangle",
}  # fmt: skip
_INVERSE = {name: f"arc{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
_FUNCTIONS = {*_INVERSE, *_INVERSE.values(), "sinh", "cosh", "tanh", "ln", "log", "exp"}
_TIMES = ("*", "/")
_SPECIAL = {r"\pi": ("constant", "pi"), "e": ("constant", "e"), "i": ("constant", "i"), r"\infty": ("constant", "inf")}
_STARTS = {"(", "[", "{", "|", r"\lfloor", r"\lceil", r"\frac", r"\sqrt", r"\binom", *_SPECIAL}
_STARTS |= {"\\" + name for name in (*_GREEK, *_FUNCTIONS, "vec", "hat", "bar", "overline")}
DEGREE: Node = ("/", ("constant", "pi"), ("number", Fraction(180)))


class Malformed(ValueError):
    """The text is no formula that this parser reads."""


class UnknownCommand(Malformed):
    """The text contains a LaTeX command that this parser does not know."""


def parse(text: str) -> Node:
    """Return the tree of a formula.

    Raises:
        Malformed: if the text is not one formula; UnknownCommand if it contains a command that is not known.
    """
    parser = _Parser(_TOKEN.findall(text))
    node = parser.sum()
    if parser.position < len(parser.tokens):
        raise Malformed(f"{parser.peek()!r} is not expected")
    return node


class _Parser:
    """A recursive-descent parser over a list of tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.position, self.depth = tokens, 0, 0
        unknown = [t for t in tokens if t.startswith("\\") and t[1:].isalpha() and not _is_known(t)]
        if unknown:
            raise UnknownCommand(unknown[0])

    def peek(self) -> str:
        """Return the next token, or an empty string at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        """Return the next token and go on to the one after it."""
        token = self.peek()
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        """Take a token that must be there."""
        if self.take() != token:
            raise Malformed(f"{token!r} is missing")

    def sum(self) -> Node:
        """Read terms that are joined by + and -."""
        terms = [self.signed()]
        while self.peek() in ("+", "-"):
            terms.append(self.signed())
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def signed(self) -> Node:
        """Read a term with any number of signs in front. A sign applies to the whole term: -3^2 is -9."""
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        node = self.product()
        return ("neg", node) if negative else node

    def product(self) -> Node:
        """Read factors, from left to right: 6/2x is (6/2)x."""
        first = self.position
        node = self.power()
        bare = self.position == first + 1  # the last factor is one token
        while (token := self.peek()) in _TIMES or self._starts_factor():
            if token in _TIMES:
                self.take()
                first = self.position
                factor = self._factor_with_sign()
            else:
                first = self.position
                if bare and self._is_number():
                    # Two numbers side by side are no product; `x2` may stand for x_2 or x^2.
                    raise Malformed("a number directly follows another factor")
                mixed = self._mixed_number(node, bare)
                factor = self.power()
                if mixed:
                    node, bare = self._join_mixed(node, factor), False
                    continue
            bare = self.position == first + 1
            # A chain of divisions stays flat, because evaluation is recursive.
            node = _times(node, ("/", ("number", Fraction(1)), factor) if token == "/" else factor)
        return node

    def _factor_with_sign(self) -> Node:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        return ("neg", self.power()) if negative else self.power()

    def _mixed_number(self, node: Node, bare: bool) -> bool:
        r"""Return whether a whole number and `\frac` with whole numbers follow each other, as in 3\frac12."""
        last = node[-1] if node[0] == "*" else node
        return bare and last[0] == "number" and last[1].denominator == 1 and self.peek() == r"\frac"

    def _join_mixed(self, node: Node, fraction: Node) -> Node:
        parts = fraction[1:] if fraction[0] == "/" else ()
        proper = len(parts) == 2 and all(p[0] == "number" and p[1].denominator == 1 for p in parts)
        if not (proper and 0 < parts[0][1] < parts[1][1]):
            return _times(node, fraction)
        if node[0] == "*":
            return ("*", *node[1:-1], ("+", node[-1], fraction))
        return ("+", node, fraction)

    def _is_number(self) -> bool:
        return self.peek()[:1].isdecimal() or self.peek()[:1] == "."

    def _starts_factor(self) -> bool:
        token = self.peek()
        if token == "|":  # after a factor, a bar closes
            return False
        return self._is_number() or token in _STARTS or (len(token) == 1 and token.isalpha())

    def power(self) -> Node:
        """Read an atom with its exponents, factorials and degree signs."""
        node = self.atom()
        for _ in range(4):
            if self.peek() == "^":
                self.take()
                if self._degree_sign():
                    node = ("*", node, DEGREE)
                else:
                    node = ("^", node, self.exponent())
            elif self.peek() == "!":
                marks = 0
                while self.peek() == "!":
                    self.take()
                    marks += 1
                if marks > 2:
                    raise Malformed("more than two exclamation marks")
                node = ("call", "factorial" if marks == 1 else "double factorial", node)
            else:
                break
        return node

    def _degree_sign(self) -> bool:
        for sign in ([r"\circ"], ["{", r"\circ", "}"]):
            if self.tokens[self.position : self.position + len(sign)] == sign:
                self.position += len(sign)
                return True
        return False

    def exponent(self) -> Node:
        """Read an exponent: a group, or one number, letter or command with an optional sign."""
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        self.depth += 1
        node = self.atom()
        if self.peek() == "^":
            self.take()
            node = ("^", node, self.exponent())
        self.depth -= 1
        return ("neg", node) if negative else node

    def atom(self) -> Node:
        """Read a number, a name, a group, a fraction, a root or a function with its argument."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Malformed(f"more than {MAX_DEPTH} parts inside each other")
        node = self._atom(self.take())
        self.depth -= 1
        return node

    def _atom(self, token: str) -> Node:
        if token[:1].isdecimal() or (token[:1] == "." and len(token) > 1):
            return self._number(token)
        if token in _CLOSING:
            return self._group(token)
        if token in _SPECIAL and self.peek() not in ("_", "'"):
            return _SPECIAL[token]
        if token == r"\frac":
            return ("/", self.argument(), self.argument())
        if token == r"\sqrt":
            return self._root()
        if token == r"\binom":
            return ("call", "binomial", self.argument(), self.argument())
        if token[1:] in _FUNCTIONS and token[0] == "\\":
            return self._function(token[1:])
        if token in (r"\vec", r"\hat", r"\bar", r"\overline"):
            return ("opaque", token, self.argument())
        if (len(token) == 1 and token.isalpha()) or token[1:] in _GREEK:
            return self._name(token)
        raise Malformed(f"{token or 'the end'!r} is not expected")

    def _number(self, token: str) -> Node:
        if self.peek() == "_":  # 1011_2: digits in another base, which are not the number 1011
            self.take()
            return ("opaque", token, self.argument())
        return ("number", Fraction(token))

    def _group(self, opening: str) -> Node:
        node = self.sum()
        if opening == "{" and self.peek() == r"\choose":
            self.take()
            node = ("call", "binomial", node, self.sum())
        self.expect(_CLOSING[opening])
        if opening in ("(", "[", "{"):
            return node
        return ("call", {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceiling"}[opening], node)

    def argument(self) -> Node:
        r"""Read the argument of a LaTeX command: a group, or a single digit, letter or command, as in \frac12."""
        token = self.peek()
        if token.isdecimal() and len(token) > 1:
            self.tokens[self.position] = token[1:]
            return ("number", Fraction(token[0]))
        if token in ("+", "-", ""):
            raise Malformed("an argument is missing")
        return self.atom()

    def _root(self) -> Node:
        degree: Node = ("number", Fraction(2))
        if self.peek() == "[":
            self.take()
            degree = self.sum()
            self.expect("]")
        return ("root", self.atom(), degree)

    def _name(self, token: str) -> Node:
        name = token
        while self.peek() in ("_", "'"):
            mark = self.take()
            name += mark if mark == "'" else f"_{self.argument()}"
        if token in ("f", "g", "h") and self.peek() == "(":  # the value of a function that is not known
            self.take()
            argument = self.sum()
            self.expect(")")
            return ("opaque", name, argument)
        return ("name", name)

    def _function(self, name: str) -> Node:
        base = power = None
        while self.peek() in ("^", "_"):
            if self.take() == "_":
                base = self.argument()
            else:
                power = self.exponent()
        if (base is not None) != (base is not None and name == "log"):
            raise Malformed(f"{name} has no base")
        if power == ("neg", ("number", Fraction(1))) and name in _INVERSE:
            name, power = _INVERSE[name], None
        inner = self._function_argument()
        node: Node = ("call", name, inner) if base is None else ("call", name, inner, base)
        return node if power is None else ("^", node, power)

    def _function_argument(self) -> Node:
        r"""Read an argument in brackets, or the product that follows: \sin 3x is sin(3x), \sin x \cos x a product."""
        if self.peek() in ("(", "[", "{", "|"):
            return self.power() if self.peek() == "|" else self.atom()
        if self.peek() in ("+", "-"):
            return self._factor_with_sign()
        node = self.power()
        while self._starts_factor() and self.peek() not in ("(", "[", "{") and self.peek()[1:] not in _FUNCTIONS:
            if self._is_number():
                raise Malformed("a number directly follows another factor")
            node = _times(node, self.power())
        if self.peek() == "/":  # sin x/2 is read in two ways
            raise Malformed("the argument of a function needs brackets")
        return node


def _times(left: Node, right: Node) -> Node:
    return ("*", *left[1:], right) if left[0] == "*" else ("*", left, right)


def _is_known(token: str) -> bool:
    return token in _STARTS or token in (r"\choose", r"\circ", r"\rfloor", r"\rceil")
