"""Units behind a number: `10 cm`, `5\\text{ square inches}`, `\\$3`, `90^\\circ`."""

from __future__ import annotations

import re

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
_EXPONENT = r"(?:\s*\^\s*\{?\s*([23])\s*\}?)?\s*"
_TEXT_UNIT = re.compile(r"\\text\s*\{([^{}]*)\}" + _EXPONENT)
_BARE_UNIT = re.compile(r"(?<=[\s\d})])([A-Za-z][A-Za-z./ ]*)" + _EXPONENT)
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?:([CF])|\\text\{\s*([CF])\s*\})?\s*$")
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")


def split_unit(text: str) -> tuple[str, str]:
    """Return (text without the unit, canonical name of the unit, empty if there is none)."""
    bare, units = text.strip(), []
    if match := re.match(r"([-+]?)\s*\\money\s*", bare):
        bare, units = match[1] + bare[match.end() :], ["dollar"]
    elif bare.endswith(r"\money"):
        bare, units = bare.removesuffix(r"\money"), ["dollar"]
    if (match := _DEGREES.search(bare)) and not _FUNCTION.search(bare):
        return bare[: match.start()].strip(), " ".join(("degree", match[1] or match[2] or "")).strip()
    while match := _last_unit(bare):
        bare = bare[: match.start()].rstrip()
        units.insert(0, match[1] + (" square" if match[2] == "2" else " cubic" if match[2] else ""))
    if not bare or bare[-1] in "=<>+-*/^_(,":
        return text.strip(), ""
    return bare, _canonical(" ".join(units))


def _last_unit(text: str) -> re.Match[str] | None:
    """Return the match of the unit at the end of a text; None if there is no unit or nothing else."""
    start = text.rfind(r"\text")
    match = _TEXT_UNIT.fullmatch(text, start) if start > 0 else None
    if match is None:
        tail = re.search(r"(?:(?<=\s)|(?<=[\d})]))(?=[A-Za-z])[A-Za-z./ ]*" + _EXPONENT + "$", text)
        match = _BARE_UNIT.fullmatch(text, tail.start()) if tail and tail.start() else None
        words = re.findall(r"[a-z]+", match[1].lower()) if match else []
        if not words or any(word not in _BARE and word.removesuffix("s") not in _BARE for word in words):
            return None
    return match


def _canonical(unit: str) -> str:
    words = re.findall(r"[a-z]+|/", unit.lower().replace(".", ""))
    names = " ".join(_SYNONYMS.get(word) or _singular(word) for word in words).split()
    powers = sorted(word for word in names if word in ("square", "cubic"))
    return " ".join(powers + [word for word in names if word not in ("square", "cubic")])


def _singular(word: str) -> str:
    if word.endswith("s") and not word.endswith("ss") and len(word) > 2:
        word = word[:-1]
    return _SYNONYMS.get(word, word)
