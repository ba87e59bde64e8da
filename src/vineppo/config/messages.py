"""Suggestions for misspelt names in error messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known dotted keys that are most similar to `name`; empty if none is similar.

    The endings of keys are compared too (`lr` is similar to `learner.lr`), and so are initials (`learning_rate` is
    similar to `learner.lr`). If several keys are equally similar, up to `limit` of them are returned.
    """
    head, _, last = name.rpartition(".")
    initials = "".join(word[:1] for word in re.split(r"[_-]+", last))
    spellings = [name, *([f"{head}.{initials}" if head else initials] if len(initials) > 1 else [])]
    scores = {
        key: max(0.9 * (_likeness(last, key) == 1), *(_likeness(spelling, key) for spelling in spellings))
        for key in known
    }
    best = max(scores.values(), default=0.0)
    return [key for key, score in scores.items() if score >= max(best - 1e-9, 0.6)][:limit]


def _likeness(name: str, key: str) -> float:
    """Similarity to a key or one of its endings (a.b.c, b.c, c): 1 if equal, at least 0.95 for a prefix of one."""
    parts, normal_name = key.split("."), _normal(name)
    endings = [_normal(".".join(parts[i:])) for i in range(len(parts))]
    is_prefix = len(normal_name) > 2 and any(ending.startswith(normal_name) for ending in endings)
    ratios = [difflib.SequenceMatcher(None, normal_name, ending).ratio() for ending in endings]
    return max(*ratios, 0.95 * is_prefix)


def _normal(name: str) -> str:
    return re.sub(r"[._-]+", "_", name.lower().strip("-"))


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean learner.lr?`, or an empty string if no known name is similar."""
    names = nearest(name, known)
    return f"did you mean {' or '.join(prefix + similar for similar in names)}?" if names else ""
