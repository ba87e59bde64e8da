r"""Rewrite the usual notations of an answer to one form of LaTeX: `½`, `1/2`, `\dfrac12` and `**\(\frac{1}{2}\)**`.

Only notations are rewritten here; no value is computed.
"""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SYMBOLS = {
    "°": r"^\circ ", "º": r"^\circ ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "⩽": r"\le ", "⩾": r"\ge ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "ℝ": r"\reals ", "∅": r"\emptyset ",
    "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "∕": "/", "⁄": "/", "−": "-", "–": "-", "±": r"\pm ",
    "∓": r"\mp ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "′": "'", "’": "'", "⟨": "(", "⟩": ")", "…": r"\dots ",
    "≈": r"\approx ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "∨": " or ", "∧": " and ", "∖": r"\setminus ",
    "€": r"\text{euro}", "£": r"\text{pound}", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
_RENAMED = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "leq": r"\le", "leqslant": r"\le", "geq": r"\ge",
    "geqslant": r"\ge", "neq": r"\ne", "lt": "<", "gt": ">", "times": "*", "cdot": "*", "ast": "*", "div": "/",
    "lbrace": r"\{", "rbrace": r"\}", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "langle": "(",
    "rangle": ")", "lbrack": "[", "rbrack": "]", "varnothing": r"\emptyset", "ldots": r"\dots", "cdots": r"\dots",
    "lor": r"\text{or}", "vee": r"\text{or}", "land": r"\text{and}", "wedge": r"\text{and}", "degree": r"^\circ",
    "backslash": r"\setminus", "dbinom": r"\binom", "tbinom": r"\binom", "infin": r"\infty", "R": r"\reals",
    "arccsc": r"\arccsc", "arcsec": r"\arcsec", "arccot": r"\arccot", "iff": "=", "quad": " ", "qquad": " ",
    "pounds": r"\text{pound}", "euro": r"\text{euro}", "percent": "%", "lg": r"\log",
}  # fmt: skip
_REMOVED = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|mathrm\{\s*\}|text\{\s*\})"
    r"(?![A-Za-z])\.?"
)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|hbox|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|operatorname)\*?"
    r"\s*\{([^{}]*)\}"
)
_COMMANDS = re.compile(r"\\([A-Za-z]+)")
_GROUPING = r"(?:\{,\}|\s*,\s*\\!\s*|\\!\s*,|(?<!\\)\\[,;: ]|~|'| )"
_GROUPED_DIGITS = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_GROUPING}\d{{3}})+(?![\d])")
_PLAIN_WORDS = re.compile(
    r"(?<![A-Za-z\\])(sqrt|pi|infinity|infty|inf|oo|sin|cos|tan|cot|sec|csc|ln|log|exp)(?![A-Za-z])"
)
_REPEATING = re.compile(
    r"(?P<whole>\d*)\.(?P<fixed>\d*)(?:\\(?:overline|bar|dot)\s*\{(?P<over>\d+)\}|\\(?:bar|dot)\s*(?P<one>\d)"
    r"|(?P<macron>(?:\d\u0305)+))(?![\d.])"
)
_IN_BRACKETS = re.compile(r"(?P<whole>\d+)\.(?P<fixed>\d*)\((?P<over>\d+)\)")
_REPEATED = re.compile(r"(?P<whole>\d+)\.(?P<fixed>\d*?)(?P<over>\d{1,12}?)(?P=over){2,}\s*(?:\\dots|\.\.\.)")
_MIXED = re.compile(r"(?<![\^_\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![\w.])")
_WRAPPERS = (
    ("**", "**"),
    ("__", "__"),
    ("`", "`"),
    ("*", "*"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("$$", "$$"),
    ("$", "$"),
)


def normal_notation(text: str) -> str:
    r"""Return an answer with usual notations rewritten.

    Spaces stay where they separate digits or words. Percent signs are removed, so that 50% equals 50 but not 0.5.
    """
    text = _unwrapped(_symbols(text.strip()))
    text = re.sub(r"\\\$|\$", r"\\money ", text)
    text = _REMOVED.sub("", text)
    text = _GROUPED_DIGITS.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = re.sub(r"\\!", "", text)
    text = re.sub(r"(?<!\\)\\[,;:\s]|~", " ", text)
    text = _TEXT.sub(_upright, text)
    text = re.sub(
        r"\\mathbb\s*\{?\s*([A-Z])\s*\}?", lambda m: r"\reals " if m[1] == "R" else rf"\text{{set {m[1]}}}", text
    )
    text = _COMMANDS.sub(lambda m: _renamed(m[1]), text)
    text = re.sub(r"\\?%|\\text\{\s*percent\s*\}|\s*\bpercent\b", "", text)
    text = _PLAIN_WORDS.sub(
        lambda m: {"oo": r"\infty", "inf": r"\infty", "infinity": r"\infty"}.get(m[1], "\\" + m[1]), text
    )
    text = text.replace("**", "^").replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    text = _REPEATED.sub(_fraction_of_repeating, _REPEATING.sub(_fraction_of_repeating, text))
    if match := _IN_BRACKETS.fullmatch(text.strip()):  # elsewhere, 0.5(3) is a product
        text = _fraction_of_repeating(match)
    text = _SCIENTIFIC.sub(r"\1*10^{\2}", _MIXED.sub(r"\1\\frac{\2}{\3}", text))
    return _without_end(re.sub(r"\s+", " ", text))


def _without_end(text: str) -> str:
    """Remove commas, semicolons and one full stop at the end. Three dots are no full stop."""
    text = text.strip().rstrip(",; ")
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip(",; ")
    return text


def _symbols(text: str) -> str:
    """Replace Unicode symbols by LaTeX or ASCII."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    pieces = []
    for character in text:
        if unicodedata.decomposition(character).startswith("<fraction>"):
            above, below = unicodedata.normalize("NFKC", character).split("⁄")
            pieces.append(rf"\frac{{{above}}}{{{below}}}")
        else:
            pieces.append(_SYMBOLS.get(character, character))
    return unicodedata.normalize("NFKC", "".join(pieces)).replace("⁄", "/")


def _unwrapped(text: str) -> str:
    """Remove Markdown and mathematics delimiters around the whole text, and Markdown emphasis in it."""
    changed = True
    while changed:
        changed = False
        for left, right in _WRAPPERS:
            inner = text[len(left) : len(text) - len(right)]
            if text.startswith(left) and text.endswith(right) and len(text) > len(left + right) and left not in inner:
                text, changed = inner.strip(), True
    # Pairs of dollar signs around a part of the text are delimiters; a single one is money.
    return re.sub(r"(?<!\\)\$([^$]*)(?<!\\)\$", r"\1", text)


def _upright(match: re.Match[str]) -> str:
    r"""Return the content of `\text{...}` and similar commands; words stay marked as `\text{words}`."""
    command, inside = match[0].partition("{")[0].strip("\\* "), match[1]
    if command == "operatorname":
        return rf"\{inside.strip()} "
    words = re.sub(r"[.()\s]", "", inside)
    is_text = re.search(r"[A-Za-z]{2,}|[^\W\d_A-Za-z]", words) or words in ("m", "g", "s", "h", "l")
    is_text = bool(is_text) and command != "mathbf" and not re.search(r"[\\_=+*]", inside)
    return rf"\text{{{inside}}}" if is_text else f" {inside} "


def _renamed(command: str) -> str:
    replacement = _RENAMED.get(command)
    return "\\" + command if replacement is None else f"{replacement} "


def _fraction_of_repeating(match: re.Match[str]) -> str:
    """Return a repeating decimal as a fraction: 0.1666... is (16 - 1) / 90."""
    groups = match.groupdict()
    block = groups.get("over") or groups.get("one") or (groups.get("macron") or "").replace("\u0305", "")
    whole, fixed = groups["whole"], groups["fixed"]
    numerator = int(whole + fixed + block) - int(whole + fixed or "0")
    return rf"(\frac{{{numerator}}}{{{'9' * len(block)}{'0' * len(fixed)}}})"
