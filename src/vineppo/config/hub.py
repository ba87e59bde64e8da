"""Ask the Hugging Face Hub whether it has a model or a data set, before a library tries to load it.

The loading functions of transformers and datasets repeat failed requests for more than a minute. One request with a
short time limit comes first, so that a misspelt name or a missing connection is reported at once.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from vineppo.types import UserError

Kind = Literal["model", "dataset"]
State = Literal["exists", "absent", "unreachable"]
_SECONDS = 2.0
"""Time limit of the request."""
_VALID_SECONDS = 60.0
"""Time for which an answer is used again, because a command asks several times about the same name."""
_REPOSITORY = re.compile(r"[\w-]([\w.-]*[\w-])?(/[\w-]([\w.-]*[\w-])?)?", re.ASCII)
_answers: dict[tuple[str, Kind], tuple[State, float]] = {}
"""(name, kind) -> (answer, value of `time.monotonic()` when it was received)."""


def is_repository_name(name: str) -> bool:
    """Return whether a text has the form of a name on the Hub: `name` or `organisation/name`."""
    return bool(_REPOSITORY.fullmatch(name)) and ".." not in name and "--" not in name


def needs_local_copy(where: str, name: str, kind: Kind, advice: str) -> bool:
    """Check that a model or data set of the Hub can be loaded. Return whether only a local copy can be loaded.

    Args:
        where: the setting and its value, with which the error message starts.
        name: name on the Hub, such as `org/name`.
        kind: `model` or `dataset`.
        advice: what the user can do, with which the error message ends.
    Returns:
        True if the cache of downloads contains a copy, and the Hub either cannot be reached or has no model or data set
        of this name that is public or that the user's token may read.
    Raises:
        UserError: if there is no copy in this case.
    """
    state = _state(name, kind)
    if state == "exists":
        return False
    if is_downloaded(name, kind):
        return True
    if state == "absent":
        raise UserError(
            f"{where} does not exist here, and the Hugging Face Hub has no {kind} {name} that is public or that your "
            f"token may read; {advice}"
        )
    raise UserError(f"{where} does not exist here, and the Hugging Face Hub cannot be reached to look for it; {advice}")


def is_downloaded(name: str, kind: Kind) -> bool:
    """Return whether the cache of downloads contains a model or data set, at least in part."""
    from huggingface_hub import constants

    folders = [Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"]
    if kind == "dataset":  # The library datasets keeps a second cache of the tables that it has prepared.
        prepared = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
        folders.append(Path(prepared) / name.replace("/", "___"))
    return any(folder.is_dir() for folder in folders)


@contextmanager
def without_requests() -> Iterator[None]:
    """Context manager in which huggingface_hub and datasets use only the cache of downloads."""
    import datasets.config
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (datasets.config, constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _state(name: str, kind: Kind) -> State:
    """Return the answer about a name, from the last minute or from a new request."""
    answer, received = _answers.get((name, kind), (None, 0.0))
    if answer is None or time.monotonic() - received > _VALID_SECONDS:
        answer = _ask(name, kind)
        _answers[name, kind] = answer, time.monotonic()
    return answer


def _ask(name: str, kind: Kind) -> State:
    """Request the description of a model or data set from the Hub, once and with a short time limit.

    The result is "exists" also if the Hub is slow or reports another error than a missing name. The library that loads
    the data then reports the error.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except RepositoryNotFoundError:
        return "absent"
    except HfHubHTTPError:
        return "exists"
    except Exception as error:  # Its class depends on the version of huggingface_hub: of requests, httpx or httpx2.
        return "exists" if "ReadTimeout" in type(error).__name__ else "unreachable"
    return "exists"
