"""Units and number words behind a number: `10 cm`, `5\\text{ square inches}`, `\\$3`, `90^\\circ`, `2 million`."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SYNONYMS = {
    "cm": "centimeter", "mm": "millimeter", "km": "kilometer", "m": "meter", "metre": "meter", "kg": "kilogram",
    "g": "gram", "gm": "gram", "mg": "milligram", "in": "inch", "inches": "inch", "ft": "foot", "feet": "foot",
    "yd": "yard", "mi": "mile", "h": "hour", "hr": "hour", "min": "minute", "s": "second", "sec": "second",
    "l": "liter", "litre": "liter", "ml": "milliliter", "lb": "pound", "lbs": "pound", "oz": "ounce", "sq": "square",
    "squared": "square", "cu": "cubic", "cubed": "cubic", "deg": "degree", "usd": "dollar", "centimetre": "centimeter",
    "kilometre": "kilometer", "millimetre": "millimeter", "mph": "mile per hour", "kph": "kilometer per hour",
    "kmh": "kilometer per hour", "/": "per", "rad": "radian", "people": "person", "men": "man", "women": "woman",
    "children": "child",
}  # fmt: skip
_BARE = {
    "cm", "mm", "km", "kg", "gm", "mg", "inch", "inches", "ft", "feet", "yd", "mi", "hr", "min", "sec", "lb", "lbs",
    "oz", "sq", "square", "squared", "cubic", "cubed", "deg", "degree", "degrees", "usd", "mph", "kph", "kmh", "foot",
    "centimeter", "meter", "metre", "kilometer", "millimeter", "gram", "kilogram", "pound", "ounce", "yard", "mile",
    "hour", "minute", "second", "day", "week", "month", "year", "liter", "litre", "gallon", "dollar", "cent", "euro",
    "unit", "per", "point", "radian", "rad", "times", "people", "student", "edge", "digit", "way",
}  # fmt: skip
_FACTORS = {
    "tens": "10", "dozen": "12", "dozens": "12", "hundred": "100", "hundreds": "100", "thousand": "1000",
    "thousands": "1000", "million": "10^6", "millions": "10^6", "billion": "10^9", "billions": "10^9",
    "trillion": "10^{12}", "trillions": "10^{12}", "half": "\\frac{1}{2}", "halves": "\\frac{1}{2}",
}  # fmt: skip
"""Number words that multiply the number in front of them: `1.5 million` is 1500000."""
_ORDINALS = {
    "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10,
    "hundredth": 100, "thousandth": 1000, "millionth": 1000000,
}  # fmt: skip
"""Words for fractions. In front of another word they are no factor: 5 third graders."""
_FACTORS |= {word + s: rf"\frac{{1}}{{{below}}}" for word, below in _ORDINALS.items() for s in ("", "s")}
_POWERS = ("squared", "cubed")
"""Words that belong to a unit, as in `cm squared`. Alone, they change the number."""
_NO_UNITS = {
    "or", "and", "more", "less", "fewer", "least", "most", "than", "above", "below", "over", "under", "negative",
    "minus", "plus", "factorial", "not",
}  # fmt: skip
"""Words that change the meaning of the number: `5 or more` is not 5."""
_EXPONENT = r"(?:\s*\^\s*\{?\s*([23])\s*\}?)?\s*"
_TEXT_UNIT = re.compile(r"\\text\s*\{([^{}]*)\}" + _EXPONENT)
_BARE_UNIT = re.compile(r"(?<=[\s\d})])([A-Za-z][A-Za-z./ ]*)" + _EXPONENT)
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?:([CF])|\\text\{\s*([CF])\s*\})?\s*$")
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")


def split_unit(text: str) -> tuple[str, str]:
    """Return (text without the unit, canonical name of the unit, empty if there is none).

    A number word becomes a factor: `1.5\\text{ million dollars}` is `(1.5)*10^6` with the unit `dollar`. If the words
    behind the number are no unit, as in `5\\text{ or more}`, the text is returned as it is.
    """
    bare = text.strip()
    currency: list[str] = []
    units: list[str] = []
    if match := re.match(r"([-+]?)\s*\\money\s*", bare):
        bare, currency = match[1] + bare[match.end() :], ["dollar"]
    elif bare.endswith(r"\money"):
        bare, currency = bare.removesuffix(r"\money"), ["dollar"]
    if (match := _DEGREES.search(bare)) and not _FUNCTION.search(bare):
        return bare[: match.start()].strip(), " ".join(("degree", match[1] or match[2] or "")).strip()
    while match := _last_unit(bare):
        bare = bare[: match.start()].rstrip()
        units.insert(0, match[1] + (" squared" if match[2] == "2" else " cubed" if match[2] else ""))
    if not bare or bare[-1] in "=<>+-*/^_(,":
        return text.strip(), ""
    words = re.findall(r"[a-z]+|/", " ".join(units).lower().replace(".", ""))
    factors = []
    while words and words[0] in _FACTORS and (len(words) == 1 or words[0] not in _ORDINALS):
        factors.append(_FACTORS[words.pop(0)])
    if not _are_unit(words):
        return text.strip(), ""
    return "*".join((f"({bare})", *factors)) if factors else bare, _canonical(currency + words)


def _last_unit(text: str) -> re.Match[str] | None:
    """Return the match of the unit at the end of a text; None if there is no unit or nothing else."""
    start = text.rfind(r"\text")
    match = _TEXT_UNIT.fullmatch(text, start) if start > 0 else None
    if match is None:
        tail = re.search(r"(?:(?<=\s)|(?<=[\d})]))(?=[A-Za-z])[A-Za-z./ ]*" + _EXPONENT + "$", text)
        match = _BARE_UNIT.fullmatch(text, tail.start()) if tail and tail.start() else None
        words = re.findall(r"[a-z]+", match[1].lower()) if match else []
        if not words or any(not _is_bare(word) for word in words):
            return None
    return match


def _is_bare(word: str) -> bool:
    """Return whether a word is a unit or a number word also without `\\text`."""
    return word in _BARE or word.removesuffix("s") in _BARE or word in _FACTORS


def _are_unit(words: Sequence[str]) -> bool:
    """Return whether words are a unit, without its number words. No words are a unit too."""
    if words and all(word in _POWERS for word in words):
        return False
    # A rate, such as parts per million, has a number word after "per".
    other = [word for before, word in zip(("", *words), words, strict=False) if before not in ("per", "/")]
    return not any(word in _NO_UNITS or (word in _FACTORS and word not in _ORDINALS) for word in other)


def _canonical(words: Sequence[str]) -> str:
    names = " ".join(_SYNONYMS.get(word) or _singular(word) for word in words).split()
    powers = sorted(word for word in names if word in ("square", "cubic"))
    return " ".join(powers + [word for word in names if word not in ("square", "cubic")])


def _singular(word: str) -> str:
    if word.endswith("s") and not word.endswith("ss") and len(word) > 2:
        word = word[:-1]
    return _SYNONYMS.get(word, word)
