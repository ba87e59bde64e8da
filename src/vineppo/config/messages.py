"""Suggest known names for misspelt names in error messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known dotted keys that are most similar to `name`. The list is empty if no key is similar.

    A key is similar if its similarity is at least 0.6 (1 means equal). `name` is also compared to the endings of the
    keys (`lr` is similar to `learner.lr`). The last part of `name` and its initials are compared too (`foo.lr` and
    `learning_rate` are similar to `learner.lr`). If several keys are equally similar, up to `limit` of them are
    returned.
    """
    head, _, last = name.rpartition(".")
    initials = "".join(word[:1] for word in re.split(r"[_-]+", last))
    spellings = [name, *([f"{head}.{initials}" if head else initials] if len(initials) > 1 else [])]
    scores = {
        key: max(0.9 * (_similarity(last, key) == 1), *(_similarity(spelling, key) for spelling in spellings))
        for key in known
    }
    best = max(scores.values(), default=0.0)
    return [key for key, score in scores.items() if score >= max(best - 1e-9, 0.6)][:limit]


def _similarity(name: str, key: str) -> float:
    """Return the highest similarity of a name to the endings of a key (for a.b.c: a.b.c, b.c and c).

    Case is ignored, and `.`, `-` and `_` are equal. The similarity is 1 if the name equals an ending, and at least 0.95
    if the name has at least 3 characters and an ending starts with it.
    """
    parts, normal_name = key.split("."), _normal(name)
    endings = [_normal(".".join(parts[i:])) for i in range(len(parts))]
    is_prefix = len(normal_name) > 2 and any(ending.startswith(normal_name) for ending in endings)
    ratios = [difflib.SequenceMatcher(None, normal_name, ending).ratio() for ending in endings]
    return max(*ratios, 0.95 * is_prefix)


def _normal(name: str) -> str:
    return re.sub(r"[._-]+", "_", name.lower().strip("-"))


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint such as `did you mean learner.lr?`, or an empty string if no known name is similar.

    Args:
        prefix: text before each suggested name, for example "--".
    """
    names = nearest(name, known)
    return f"did you mean {' or '.join(prefix + similar for similar in names)}?" if names else ""
