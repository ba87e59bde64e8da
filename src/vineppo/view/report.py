"""Write the report of a run: what it was, what it reached, what it cost, and the responses that say most about it.

`report.md` links to the plots; `report.html` contains them and needs no other file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vineppo.config.load import config_to_dict
from vineppo.config.offline import OfflineConfig
from vineppo.config.settings import Settings
from vineppo.run.directory import RunDirectory
from vineppo.run.files import write_text
from vineppo.training.configure import config_class_with_all_sections
from vineppo.types import UserError
from vineppo.view.documents import (
    Block,
    Heading,
    Image,
    Items,
    Link,
    Paragraph,
    Preformatted,
    Table,
    to_html,
    to_markdown,
)
from vineppo.view.page import write_page
from vineppo.view.queues import Entry, disagree, drops, has_values, lucky, truncated
from vineppo.view.records import iterations_of, responses_of
from vineppo.view.response import Response
from vineppo.view.terminal import show_response

VIEWER = "view.html"
"""Name of the page with all responses, in the directory of a run."""
_PLOTS = {
    "accuracy": "Accuracy and reward over updates",
    "tokens": "Tokens generated for training, by phase",
    "seconds": "Time of each phase",
}
"""Name of the file of each plot -> what it shows."""
_WIDTH = 100
"""Width of a response in characters."""
_LINES = 60
"""Largest number of lines of a response that the report shows."""
_NOT_LISTED = ("run.dir",)
"""Settings that are not compared with their defaults."""
_DIM = 'style="color: #7f7f7f; text-decoration-color: #7f7f7f"'
"""Style that rich gives faint text. The report's own colours have more contrast."""


def write_viewer(run_dir: str | Path) -> Path | None:
    """Write `view.html` into a run directory (`page.py`), and return its path.

    The result is None if no responses are saved or can be read, or if the file cannot be written.

    Raises:
        UserError: if it is not a run directory.
    """
    path = RunDirectory.open(run_dir, writable=False).path / VIEWER
    try:
        write_page(path, [path.parent])
    except UserError:
        return None
    return path


def write_report(run_dir: str | Path) -> tuple[Path, Path]:
    """Write `report.md` and `report.html` into a run directory, and return their paths.

    The run may still be going on. The plots are those that exist. If `view.html` exists (`write_viewer`), the report
    has links to the responses in it.

    Raises:
        UserError: if it is not a run directory, or metrics.jsonl is damaged.
        OSError: if the files cannot be written.
    """
    run = RunDirectory.open(run_dir, writable=False)
    blocks = report_blocks(run)
    paths = run.path / "report.md", run.path / "report.html"
    write_text(paths[0], to_markdown(blocks, run.path))
    write_text(paths[1], to_html(blocks, _title(run)))
    return paths


def report_blocks(run: RunDirectory) -> list[Block]:
    """Return the content of the report of a run.

    Raises:
        UserError: if metrics.jsonl is damaged.
    """
    summary, lines = run.read_summary(), run.read_metrics()
    blocks: list[Block] = [Heading(_title(run), 1), Paragraph(_state(run, summary, lines))]
    blocks += [Heading("Accuracy"), *_accuracy(summary, lines)]
    blocks += [Heading("Cost"), *_cost(summary, lines)]
    blocks += [Heading("Warnings"), *_warnings(summary)]
    blocks += [Heading("Settings that differ from the defaults"), *_settings(run)]
    blocks += [Heading("Plots"), *_plots(run)]
    blocks += [Heading("Responses"), *_responses(run)]
    return [*blocks, Heading("More"), *_more(run)]


def _title(run: RunDirectory) -> str:
    """Return the title, such as `VinePPO, seed 0, judgement`; without a summary, the name of the directory."""
    summary = run.read_summary()
    if not summary:
        return f"Run {run.path.resolve().name}"
    parts = [str(summary.get("label") or ""), f"seed {summary.get('seed')}", str(summary.get("recipe") or "")]
    return ", ".join(part for part in parts if part)


def _state(run: RunDirectory, summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence about the run and how far it went."""
    model, task = run.config.get("model"), run.config.get("task")
    what = [
        f"{name} {part[key]}"
        for name, part, key in (("Model", model, "path"), ("task", task, "name"))
        if isinstance(part, Mapping) and part.get(key)
    ]
    done = lines[-1]["iteration"] if lines else 0
    reason = summary.get("finish_reason")
    if reason is None:
        state = f"The run has not finished; {_count(done, 'iteration')} so far."
    elif reason == "interrupted":
        state = f"The run was interrupted after {_count(done, 'iteration')}."
    else:
        state = f"The run ended after {_count(summary.get('iterations', done), 'iteration')} (reason: {reason})."
    return f"{', '.join(what)}. {state}" if what else state


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def _percent(interval: Mapping[str, Any]) -> tuple[str, str]:
    """Return (mean, 95% interval) in percent; a dash for what is unknown."""
    mean, low, high = (interval.get(key) for key in ("mean", "low", "high"))
    bounds = "-" if low is None or high is None else f"{100 * low:.1f}% to {100 * high:.1f}%"
    return ("-" if mean is None else f"{100 * mean:.1f}%"), bounds


def _accuracy(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """Yield the accuracy before and after training, or that of the evaluations so far."""
    names = {
        "accuracy_before": "before training",
        "accuracy_after": "after training",
        "greedy_before": "before training, greedy",
        "greedy_after": "after training, greedy",
    }
    known = {name: summary[key] for key, name in names.items() if isinstance(summary.get(key), Mapping)}
    if not known:
        evaluated = [line for line in lines if line.get("eval/accuracy") is not None]
        for line in dict.fromkeys((0, len(evaluated) - 1)) if evaluated else ():
            entry = evaluated[line]
            bounds = {key: entry.get(f"eval/accuracy_{key}") for key in ("low", "high")}
            known[f"iteration {entry['iteration']}, validation problems"] = {"mean": entry["eval/accuracy"], **bounds}
    if not any(interval.get("mean") is not None for interval in known.values()):
        yield Paragraph("No accuracy was measured.")
        return
    yield Table(("", "accuracy", "95% interval"), tuple((name, *_percent(value)) for name, value in known.items()))
    before, after = (summary.get(f"accuracy_{when}") or {} for when in ("before", "after"))
    if before.get("mean") is not None and after.get("mean") is not None:
        change = f"{100 * (after['mean'] - before['mean']):+.1f} points"
        yield Paragraph(f"Change: {change}. The intervals are over problems; they do not include other seeds.")


def _cost(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """Yield the cost in updates, generated tokens, trained tokens and seconds."""
    last = lines[-1] if lines else {}
    tokens = summary.get("tokens") or {
        name: last.get(f"tokens/{name}") for name in ("rollouts", "mc", "generated", "trained")
    }
    seconds = summary.get("seconds", last.get("seconds/train"))
    parts = [f"{_amount(tokens.get('rollouts'))} in rollouts"]
    if tokens.get("mc"):
        parts.append(f"{_amount(tokens['mc'])} in MC rollouts")
    evaluation = summary.get("seconds_eval")
    memory = summary.get("peak_memory_bytes")
    rows = [
        ("updates", _amount(summary.get("updates", last.get("updates"))), ""),
        ("generated tokens", _amount(tokens.get("generated")), ", ".join(parts)),
        ("trained tokens", _amount(tokens.get("trained")), "counted in every epoch"),
        ("seconds of training", _amount(seconds), "" if evaluation is None else f"and {evaluation:,.0f} of evaluation"),
    ]
    if memory:
        rows.append(("peak memory", f"{memory / 1e9:.2f} GB", ""))
    yield Table(("cost", "amount", ""), tuple(rows))


def _amount(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _warnings(summary: Mapping[str, Any]) -> Iterator[Block]:
    given = summary.get("warnings")
    if not summary:
        yield Paragraph("They are recorded at the end of the run.")
    elif isinstance(given, list) and given:
        yield Items(tuple(str(text) for text in given))
    else:
        yield Paragraph("None.")


def _settings(run: RunDirectory) -> Iterator[Block]:
    rows = changed_settings(run.config)
    if not rows:
        yield Paragraph("None.")
        return
    yield Table(("setting", "value", "default"), tuple(rows))


def changed_settings(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (key, value, default) of each setting of a run that differs from its default, in the order of the file.

    Args:
        config: content of config.yaml. Settings of algorithms outside the package have no known default; all are
            returned, with a dash.
    """
    is_offline = "method" in config and "algorithm" not in config
    cls: type[Settings] = OfflineConfig if is_offline else config_class_with_all_sections()
    defaults = _flat(config_to_dict(cls()))
    return [
        (key, _shown(value), _shown(defaults[key]) if key in defaults else "-")
        for key, value in _flat(config).items()
        if key not in _NOT_LISTED and (key not in defaults or defaults[key] != value)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: Any) -> str:
    """Return the value of a setting as text, as on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "(none)"
    return "(none)" if value in (None, "", {}) else str(value)


def _plots(run: RunDirectory) -> Iterator[Block]:
    paths = [(run.plots / f"{name}.png", text) for name, text in _PLOTS.items()]
    found = [Image(path, text) for path, text in paths if path.is_file()]
    yield from found
    if not found:
        yield Paragraph(f"There are none yet; vineppo plot {run.path} makes them.")


@dataclass(frozen=True)
class Telling:
    """A response that the report shows."""

    title: str
    response: Response
    entry: Entry | None
    """The entry of the queue that it comes from."""


def telling_responses(run: str | Path) -> list[Telling]:
    """Return the responses that say most about a run, at most five.

    They are the largest fall in the first saved iteration; and of the newest one, the largest fall, the first response
    that is right in spite of a wrong step, the first that was cut off, and the first step at which the trained credit
    and the Monte-Carlo values disagree (`queues.py`). A response is returned once.

    Raises:
        UserError: if no responses are saved, or a file cannot be read.
    """
    known = iterations_of(run)
    newest = _rollouts(run, known[-1])
    chosen = [] if known[0] == known[-1] else [("Largest fall of the first iteration", drops(_rollouts(run, known[0])))]
    chosen += [
        ("Largest fall of the newest iteration", drops(newest)),
        ("Right by wrong steps", lucky(newest) if has_values(newest) else []),
        ("Cut off", truncated(newest)),
    ]
    if any(step.num_mc_rollouts is not None for response in newest for step in response.steps):
        chosen.append(("Credit and values disagree", disagree(newest)))
    found: dict[tuple[int, int], Telling] = {}
    for title, entries in chosen:
        if entries:
            response = entries[0].response
            found.setdefault((response.iteration, response.number), Telling(title, response, entries[0]))
    if not found and newest:
        found[0, 0] = Telling("First response of the newest iteration", newest[0], None)
    return list(found.values())


def _rollouts(run: str | Path, iteration: int) -> list[Response]:
    return [response for response in responses_of(run, iteration) if response.kind == "rollout"]


def _responses(run: RunDirectory) -> Iterator[Block]:
    """Yield the most telling responses with their credit, as `vineppo show` prints them."""
    try:
        telling = telling_responses(run.path)
    except UserError as error:
        yield Paragraph(f"No responses can be shown: {error}.")
        return
    label = str(run.read_summary().get("label") or run.config.get("algorithm", ""))
    for item in telling:
        response, entry = item.response, item.entry
        yield Heading(f"{item.title}{'' if entry is None else f': {entry.reason}'}", 3)
        yield _shown_response(response, label, entry)
        step = "" if entry is None or entry.step is None else f" --step {entry.step.number}"
        if (run.path / VIEWER).is_file():
            yield Link(VIEWER, "This response in the credit viewer", _place(response, entry))
        yield Paragraph(f"In the terminal: vineppo show {run.path} {response.iteration} {response.number}{step}")


def _place(response: Response, entry: Entry | None) -> str:
    """Return the part of the viewer's address that names a response and its step."""
    step = "" if entry is None or entry.step is None else f"&step={entry.step.number}"
    return f"r={response.iteration}.{response.number}{step}"


def _shown_response(response: Response, label: str, entry: Entry | None) -> Preformatted:
    """Return a response as `vineppo show` prints it, without colours for Markdown and with them for HTML."""
    step = None if entry is None else entry.step
    plain = Console(file=io.StringIO(), width=_WIDTH, no_color=True, color_system=None, highlight=False)
    show_response(plain, response, label=label, step=step)
    assert isinstance(plain.file, io.StringIO)
    coloured = Console(
        file=io.StringIO(),
        width=_WIDTH,
        record=True,
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
        legacy_windows=False,
        highlight=False,
    )
    show_response(coloured, response, label=label, step=step)
    markup = coloured.export_html(inline_styles=True, code_format="{code}").replace(_DIM, 'class="soft"')
    return Preformatted(_first_lines(plain.file.getvalue()), _first_lines(markup))


def _first_lines(text: str) -> str:
    """Return the first and the last lines of a long text. A line is complete markup, because no style spans lines."""
    lines = text.rstrip().split("\n")
    if len(lines) <= _LINES:
        return "\n".join(lines)
    half = _LINES // 2
    return "\n".join([*lines[:half], f"... ({len(lines) - 2 * half} more lines)", *lines[-half:]])


def _more(run: RunDirectory) -> Iterator[Block]:
    """Yield the link to the viewer's file, if it exists, and commands that show more."""
    if (run.path / VIEWER).is_file():
        yield Link(VIEWER, "All saved responses, in the credit viewer")
    commands = [f"vineppo show {run.path} all --drops: the largest falls of all iterations"]
    if not (run.path / VIEWER).is_file():
        commands.append(f"vineppo report {run.path}: this report again, with a page of all saved responses")
    yield Items(tuple(commands))
