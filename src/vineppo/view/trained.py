"""Train a run, and write its report and its page of responses at its end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vineppo.config.schema import Config
from vineppo.objects import first_line
from vineppo.run.peers import launched_ranks
from vineppo.training import loop
from vineppo.training.configure import with_algorithm_section, with_run_dir
from vineppo.training.parts import NOTHING_IN_MEMORY, InMemory
from vineppo.training.session import Reporter
from vineppo.types import RewardFn
from vineppo.view.report import write_report, write_viewer

MAX_TOKENS = 500_000
"""`report_finished` writes the page of a run whose responses have at most so many tokens, which takes ten seconds."""


def train(
    config: Config,
    *,
    recipe: str = "",
    reward_fn: RewardFn | Sequence[RewardFn] | None = None,
    reporter: Reporter | None = None,
    in_memory: InMemory = NOTHING_IN_MEMORY,
) -> dict[str, Any]:
    """Train a model in a new run directory, and write `report.md`, `report.html` and `view.html` into it.

    Args:
        config: all settings. An empty `run.dir` becomes `runs/<recipe>-<algorithm>-seed<seed>`, with the name of the
            task in place of an empty `recipe`.
        recipe: name of the recipe from which `config` was built, or empty; it is written to summary.json.
        reward_fn: one or several functions that replace the task's graders. Signature: fn(prompts, completions,
            completion_ids, **columns) -> list with one number per completion, or None where the function does not
            apply. `columns` are the other columns of the problems, each a list with one entry per completion. The
            functions are called in this process.
        reporter: receives the progress of the run; optional.
        in_memory: a model or data sets that are used instead of loading the configured ones.
    Returns:
        The content of summary.json.
    Raises:
        UserError: if the settings, the model, the data or the graders cannot be used, if the run directory exists and
            is not empty, or if the disk is full.
    """
    config = with_run_dir(with_algorithm_section(config), recipe)
    summary = loop.train(config, recipe=recipe, reward_fn=reward_fn, reporter=reporter, in_memory=in_memory)
    report_finished(Path(config.run.dir), summary)
    return summary


def report_finished(run_dir: Path, summary: Mapping[str, Any]) -> Path | None:
    """Write the report of a run that has ended, and its page of responses (`view.html`).

    The page is left out if the responses have more than `MAX_TOKENS` tokens; `vineppo report` writes it at any length.
    If a file cannot be written, the run is complete nevertheless, and there is a warning. Of several processes, only
    the first one writes.

    Args:
        run_dir: the directory of the run.
        summary: the content of summary.json. An interrupted run gets no report.
    Returns:
        The path of the HTML file of the report, or None if there is none.
    """
    if summary.get("finish_reason") == "interrupted" or launched_ranks()[0] > 0:
        return None
    try:
        if _is_short(summary):
            write_viewer(run_dir)
        return write_report(run_dir)[1]
    except Exception as error:
        warnings.warn(
            f"the report could not be made ({first_line(error)}); make it with `vineppo report {run_dir}`",
            stacklevel=2,
        )
        return None


def _is_short(summary: Mapping[str, Any]) -> bool:
    return ((summary.get("tokens") or {}).get("rollouts") or 0) <= MAX_TOKENS
