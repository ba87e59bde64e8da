"""Write the report of `vineppo blame`, and draw its plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vineppo.measure.output import about_brackets, heading, interval, number, table
from vineppo.run.figures import GREY, canvas, finish, save


def markdown(result: Mapping[str, Any]) -> str:
    """Return the text of blame.md from the content of blame.json."""
    whose = "failed responses" if result["which"] == "failed" else "responses"
    lines = [
        *heading(result, "Did the blamed step cause the failure?"),
        f"{result['num_responses']} {whose} to {result['num_problems']} problems; the mean reward of all responses is "
        f"{result['mean_reward']:.3f}. The blamed step has the largest drop of the value, from {result['k']} "
        f"continuations per state. The effect of resampling a step is the success of {result['score']} new "
        "continuations from the state before it, minus that of new continuations that keep the step. The control is a "
        "random step at the same depth of a response to another problem. "
        f"{about_brackets(result['num_problems'])}",
        "",
        *table(
            ["step", "change of success"],
            [
                ["blamed", interval(result["blamed"])],
                ["random, same depth, another response (control)", interval(result["control"])],
                ["random other step of the same response", interval(result["sibling"])],
                ["**blamed - control**", interval(result["difference"])],
                ["blamed - other step of the same response", interval(result["difference_sibling"])],
            ],
        ),
        "",
        f"Success is {interval(result['resampled'])} after resampling the blamed step and {interval(result['kept'])} "
        f"with it. The drop that chose the step is {interval(result['drop'])} on average{_about_drop(result)}. The "
        f"control is itself the blamed step of its response in {100 * result['same_step']:.0f}% of the trials.",
        "",
        *(
            []
            if result["resampled"]["mean"] or result["kept"]["mean"]
            else ["**No continuation was right, so no step can be blamed; give another task or model.**", ""]
        ),
        *_checked(result["checked"], result["k"]),
        "Plot: [blame.png](blame.png).",
        "",
    ]
    return "\n".join(lines)


def _about_drop(result: Mapping[str, Any]) -> str:
    """Return why the drop is larger than the effect, if it is."""
    larger = (result["drop"]["mean"] or 0.0) > (result["blamed"]["mean"] or 0.0)
    return ": larger than the effect, because the largest of several noisy drops is chosen" if larger else ""


def _checked(checked: Mapping[str, Any], k: int) -> list[str]:
    """Return the lines about steps that a machine can check."""
    if not checked:
        return ["The steps of this task cannot be checked by a machine.", ""]
    return [
        f"Steps that a machine can check: {checked['with_wrong_step']} of {checked['responses']} responses (the first "
        f"one of each problem) have a wrong step. The prediction is the largest drop, if it is at least "
        f"{checked['drop']:g} (K = {k}).",
        "",
        *table(
            ["first wrong step", ""],
            [
                ["precision", interval(checked["precision"])],
                ["recall", interval(checked["recall"])],
                ["F1", interval(checked["f1"])],
                ["recall of a random step", number(checked["chance"])],
                ["success after the first wrong step", interval(checked["recovery"])],
                ["responses with a wrong step that are right", number(checked["right_with_wrong_step"])],
            ],
        ),
        "",
        f"{checked['wrong_without_wrong_step']} responses are wrong although no step is.",
        "",
        "A Monte-Carlo value is not the correctness of a step (arXiv 2501.07301). It is the success of this policy "
        "from there on: a wrong step from which the policy recovers has no drop, and a right step that leads into a "
        "part that the policy cannot do has one. The F1 says how far the two agree for this policy and task; it is no "
        "measure of the values' error.",
        "",
    ]


def plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw blame.png: the change of success of the blamed steps and of the controls."""
    subtitle = f"{result['num_responses']} responses to {result['num_problems']} problems, 95% intervals over problems"
    figure, axes = canvas("Change of success when a step is resampled", subtitle, height=3.6)
    rows = (
        ("blamed", "blamed step", "#D55E00"),
        ("control", "random step, same depth", "#0072B2"),
        ("sibling", "random step, same response", "#009E73"),
    )
    for place, (key, _, colour) in enumerate(rows):
        value = result[key]
        if value["mean"] is None:
            continue
        single = [trial[key] for trial in result["trials"] if trial[key] is not None]
        axes.scatter(single, [place + 0.2] * len(single), s=14, color=colour, alpha=0.35, linewidths=0)
        if value["low"] is not None:
            axes.plot([value["low"], value["high"]], [place, place], color=colour, linewidth=3)
        axes.plot(value["mean"], place, color=colour, marker="o", markersize=9)
    axes.axvline(0, color=GREY, linewidth=1, linestyle="--")
    finish(axes, "success after resampling minus success of keeping the step", "")
    axes.set_yticks(range(len(rows)), [label for _, label, _ in rows], fontsize=12)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    return [save(figure, folder / "blame.png")]
