"""Measure on which kinds of task a credit method needs fewer generated tokens than the best baseline.

    python benchmarks/map.py --arms docs/results/equal_tokens/arms.yaml --arm counterfactual \
        --baselines reinforce --few_baselines rloo --seeds 5 --budget 300000 --jobs 2 --out runs/map

The tasks are neighbours of the recipe `wording` (`POINTS`): each differs from it in one property, such as the share of
decisive steps or the number of training problems. On each task, `vineppo compare` trains all arms with the same seeds
and the same budget of generated tokens, which is proportional to the length of the chains. The settings of the arms
are not tuned again for each task, so this is a map of fixed configurations. The models for other lengths of the chains
are trained first, in the same three stages as the embedded model (an hour for 20 steps).

`map.json` has one entry per task: the accuracies on new problems and on the training problems; the baseline that is
best on this task; the tokens and the seconds that it needs to its best mean accuracy, divided by those that the method
needs to the same accuracy, with 95% intervals over seeds; and the difference of the accuracies at equal tokens.
`map.md` is the table, `map.png` the picture. What exists in `--out` is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vineppo.compare.arms import load_arms
from vineppo.compare.spec import parse_budget, parse_seeds
from vineppo.compare.tables import format_interval
from vineppo.statistics import interval_over_seeds
from vineppo.types import UserError

LAST = 5
"""The accuracy on training problems is the mean reward of this many last iterations."""
STAGES = ("sft-judgement-wavering", "sft-judgement", "sft-wording")
"""Recipes with which the embedded model `wording` was trained, one after the other."""
COLOURS = ("#7F3C8D", "#888888", "#E68310", "#3969AC", "#11A579")
"""Colours of the arms in the picture: the method first, then the baselines."""


@dataclass(frozen=True)
class Point:
    """A task of the map."""

    name: str
    axis: str
    """The property in which the task differs from the recipe."""
    label: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of the recipe that change: dotted key -> value."""
    steps: int = 10
    """Number of steps of the chains. For other numbers than 10, a model is trained first."""

    def arms(self, options: argparse.Namespace) -> tuple[str, ...]:
        """Return the names of the arms on this task, the measured one first."""
        few = options.few_baselines if "task.train_problems" in self.settings else ()
        return (options.arm, *options.baselines, *few)


def _length(steps: int, traps: float) -> Point:
    """Return a task with chains of another length and about the same number of traps as the recipe, 3.3."""
    settings = {"task.num_steps": str(steps), "task.trap_share": f"{traps / steps:.3f}"}
    settings["rollouts.max_new_tokens"] = str(12 * steps)
    return Point(f"steps{steps}", "steps of a chain, 3.3 of them decisive", f"{steps} steps", settings, steps)


BASE = Point("base", "the recipe `wording`", "10 steps, a third decisive, free wording, endless problems")
POINTS = (
    BASE,
    _length(5, 3.33),
    _length(20, 3.33),
    *(
        Point(f"share{share}", "share of decisive steps", f"{share:.0%}", {"task.trap_share": str(share)})
        for share in (0.1, 0.2, 0.5)
    ),
    Point("settled", "wording", "settled", {"model.path": "embedded:judgement"}),
    Point("habit", "number of decisions", "one (`habit`)", {"model.path": "embedded:habit", "task.level": "habit"}),
    *(
        Point(f"problems{count}", "training problems", str(count), {"task.train_problems": str(count)})
        for count in (32, 256)
    ),
)


def _model(point: Point, folder: Path) -> Path:
    """Return the directory of the starting model for chains of another length. Train it if it does not exist."""
    options = {"task.num_steps": str(point.steps), "max_length": "512"}
    for stage in STAGES:
        path = folder / "models" / point.name / stage
        if not (path / "config.json").exists():
            _run(["sft", stage, "--out", str(path), *_flags(options)])
        options["model.path"] = str(path)
    return path


def _budget(point: Point, options: argparse.Namespace) -> int:
    """Return the generated tokens of a run, in proportion to the length: the number of responses stays the same."""
    return options.budget * point.steps // BASE.steps


def _compare(point: Point, options: argparse.Namespace) -> dict[str, Any]:
    """Train all arms on a task, and return what `vineppo compare` measured."""
    settings = {"eval.num_problems": "256", "eval.every": "2", "eval.final_num_problems": "512", **options.set}
    settings |= {**point.settings, "run.save_rollouts": "false"}
    if point.steps != 10:
        settings["model.path"] = str(_model(point, options.out))
    out = options.out / point.name
    content = yaml.safe_load(options.arms.read_text())
    arms_file = options.out / "arms.yaml"
    arms_file.write_text(yaml.safe_dump({name: content[name] for name in point.arms(options)}))
    command = ["compare", "wording", "--arms", str(arms_file), "--baselines", ",".join(point.arms(options)[1:])]
    command += ["--seeds", options.seeds, "--budget", f"tokens={_budget(point, options)}", "--jobs", str(options.jobs)]
    command += ["--out", str(out)]
    _run([*command, *_flags(settings)])
    return json.loads((out / "compare.json").read_text())


def _run(arguments: Sequence[str]) -> None:
    """Run a command of vineppo. Its output is shown; an error ends the script."""
    code = subprocess.run([sys.executable, "-m", "vineppo", *arguments]).returncode
    if code:
        sys.exit(code)


def _flags(settings: Mapping[str, str]) -> list[str]:
    """Return settings as options of the command line."""
    return [text for key, value in settings.items() for text in (f"--{key}", value)]


def _train_accuracy(folder: Path, arm: str, seeds: str) -> float:
    """Return the mean reward in the last iterations of the runs of an arm, which is the accuracy on their problems.

    The folder may have runs with other seeds from an earlier call.
    """
    rewards = []
    for seed in parse_seeds(seeds):
        run = folder / "runs" / f"{arm}-seed{seed}"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rewards.append(statistics.fmean([row["reward/mean"] for row in rows if "reward/mean" in row][-LAST:]))
    return statistics.fmean(rewards)


def _entry(point: Point, options: argparse.Namespace, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a task in map.json."""
    best, arms = result["best_vs_baseline"], {}
    for name in point.arms(options):
        arm = result["arms"][name]
        arms[name] = {
            "accuracy_before": arm["accuracy_before"]["mean"],
            "accuracy_after": arm["final_accuracy"],
            "accuracy_on_training_problems": _train_accuracy(options.out / point.name, name, options.seeds),
        }
    keys = ["baseline", "baseline_best_accuracy", "tokens_ratio", "tokens_ratio_interval", "seconds_ratio"]
    keys += ["seconds_ratio_interval", "difference_at_equal_tokens", "reason"]
    described = {"axis": point.axis, "label": point.label, "settings": dict(point.settings)}
    return {**described, "arms": arms, **{key: best[key] for key in keys}}


def _interval(value: Mapping[str, Any] | None, scale: float = 1, digits: int = 2) -> str:
    """Return an interval as text."""
    if not value or value["low"] is None:
        return ""
    return f" [{scale * value['low']:.{digits}f}, {scale * value['high']:.{digits}f}]"


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of all arms, the measured one first."""
    return (options.arm, *options.baselines, *options.few_baselines)


def _why_no_ratio(entry: Mapping[str, Any]) -> str:
    """Return why there is no ratio. The arm may start at the baseline's best accuracy, or never reach it."""
    starts = "starts at" in (entry["reason"] or "")
    return f"the baseline's best accuracy is {'the start' if starts else 'not reached'}"


def _table(entries: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> str:
    """Return map.md."""
    names = _names(options)
    lines = [
        f"# Where `{options.arm}` needs fewer tokens than the best baseline",
        "",
        f"{len(parse_seeds(options.seeds))} seed(s), {options.budget:,} generated tokens per run for chains of "
        f"{BASE.steps} steps, and in proportion for other lengths. Command: `{options.command}`.",
        "",
        "*Tokens* and *seconds*: the amount that the best baseline needs to its best mean accuracy, divided by the "
        f"amount that `{options.arm}` needs to the same accuracy; - if it never reaches it, or starts at it. "
        f"*Difference*: accuracy of `{options.arm}` minus that of this baseline after the same number of generated "
        f"tokens, in points. *Train*: mean reward of the last {LAST} iterations. Intervals are 95% over seeds.",
        "",
        f"| axis | task | before | {' | '.join(f'{name}: after (train)' for name in names)} | best baseline | tokens "
        "| seconds | difference |",
        "|---|---|---|---|" + "---|" * len(names) + "---|---|---|",
    ]
    for entry in entries.values():
        cells = [entry["axis"], entry["label"], f"{entry['arms'][options.arm]['accuracy_before']:.0%}"]
        for name in names:
            if (of_arm := entry["arms"].get(name)) is None:
                cells.append("")
                continue
            after = of_arm["accuracy_after"]
            trained = of_arm["accuracy_on_training_problems"]
            cells.append(f"{format_interval(after)} ({trained:.0%})")
        cells.append(entry["baseline"])
        for key in ("tokens_ratio", "seconds_ratio"):
            ratio = entry[key]
            cells.append("-" if ratio is None else f"{ratio:.2f}{_interval(entry[key + '_interval'])}")
        difference = entry["difference_at_equal_tokens"]
        mean = difference["mean"]
        cells.append("-" if mean is None else f"{100 * mean:+.1f}{_interval(difference, 100, 1)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _over_tasks_text(entries, options.arm)])


def _over_tasks(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean difference over the tasks, and the geometric mean of the ratios of tokens where there are any.

    The intervals are Student's t intervals over tasks, each of which is one number.
    """
    means = [entry["difference_at_equal_tokens"]["mean"] for entry in entries.values()]
    differences = [mean for mean in means if mean is not None]
    logs = [math.log(entry["tokens_ratio"]) for entry in entries.values() if entry["tokens_ratio"] is not None]
    return {
        "tasks": len(entries),
        "difference": _mean_over_tasks(differences),
        "tasks_with_ratio": len(logs),
        "tokens_ratio": _mean_over_tasks(logs, math.exp),
    }


def _mean_over_tasks(
    values: Sequence[float], scale: Callable[[float], float] = float
) -> dict[str, float | None] | None:
    """Return the mean of values with its interval, all in another scale; None without values."""
    if not values:
        return None
    bounds = asdict(interval_over_seeds(values))
    return {key: None if math.isnan(bound) else scale(bound) for key, bound in bounds.items()}


def _over_tasks_text(entries: Mapping[str, Mapping[str, Any]], arm: str) -> str:
    """Return `_over_tasks` as sentences."""
    summary = _over_tasks(entries)
    if not (difference := summary["difference"]) or not (ratio := summary["tokens_ratio"]):
        return ""
    return (
        f"Over the {summary['tasks']} tasks, `{arm}` is {100 * difference['mean']:+.1f} points"
        f"{_interval(difference, 100, 1)} from the best baseline at equal generated tokens. Where it reaches the "
        f"baseline's best accuracy ({summary['tasks_with_ratio']} tasks), the baseline needs {ratio['mean']:.2f}"
        f"{_interval(ratio)} times its tokens (geometric mean). These two intervals are over tasks.\n"
    )


def _picture(entries: Mapping[str, Mapping[str, Any]], options: argparse.Namespace, path: Path) -> None:
    """Draw the ratio of the tokens and the accuracies of every task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(_names(options), COLOURS, strict=False))
    rows = list(entries.values())[::-1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 0.45 * len(rows) + 2.3), sharey=True)
    for position, entry in enumerate(rows):
        ratio, interval = entry["tokens_ratio"], entry["tokens_ratio_interval"] or {}
        if ratio is None:
            left.text(1, position, f" {_why_no_ratio(entry)}", va="center", fontsize=8)
        else:
            left.plot(ratio, position, "o", color=COLOURS[0])
        if interval.get("low") is not None:
            left.plot([interval["low"], interval["high"]], [position] * 2, color=COLOURS[0])
        for number, (name, of_arm) in enumerate(entry["arms"].items()):
            colour, height = colours[name], position + 0.16 * ((len(entry["arms"]) - 1) / 2 - number)
            after = of_arm["accuracy_after"]
            right.plot(100 * after["mean"], height, "o", color=colour, markersize=5)
            if after["low"] is not None:
                right.plot([100 * after["low"], 100 * after["high"]], [height] * 2, color=colour)
            right.plot(100 * of_arm["accuracy_on_training_problems"], height, "|", color=colour, markersize=9)
    if overall := _over_tasks(entries)["tokens_ratio"]:
        left.plot(overall["mean"], -1, "D", color="black")
        if overall["low"] is not None:
            left.plot([overall["low"], overall["high"]], [-1, -1], color="black")
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    low, high = left.get_xlim()
    left.set_xlim(min(0.5, low), max(4, high))
    left.set_ylim(-1.6, len(rows) - 0.4)
    labels = ["geometric mean of the tasks with a ratio", *(f"{entry['axis']}: {entry['label']}" for entry in rows)]
    left.set_yticks(range(-1, len(rows)), labels, fontsize=8)
    left.set_xlabel(f"tokens of the best baseline divided by\nthose of {options.arm}")
    right.set_xlim(-2, 102)
    right.set_xlabel("accuracy, %\n(dot: new problems, bar: training problems)")
    for name, colour in colours.items():
        right.plot([], [], "o", color=colour, label=name)
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(colours), fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and check names before the first run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, required=True, help="YAML file with all arms, as for `vineppo compare`")
    parser.add_argument("--arm", default="counterfactual", help="name of the arm that is measured")
    parser.add_argument("--baselines", default="reinforce", help="names of the other arms")
    parser.add_argument(
        "--few_baselines", default="", help="further arms on the tasks with a limited number of training problems"
    )
    parser.add_argument("--points", default=",".join(point.name for point in POINTS), help="tasks, by name")
    parser.add_argument("--seeds", default="3", help="as for `vineppo compare`")
    parser.add_argument("--budget", type=int, default=300_000, help="generated tokens of a run, for 10 steps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.command = " ".join(["python benchmarks/map.py", *(sys.argv[1:] if arguments is None else arguments)])
    options.baselines = options.baselines.split(",")
    options.few_baselines = options.few_baselines.split(",") if options.few_baselines else []
    if len(_names(options)) > len(COLOURS):
        parser.error(f"--baselines and --few_baselines: at most {len(COLOURS) - 1} together")
    chosen = _names(options)
    twice = sorted({name for name in chosen if chosen.count(name) > 1})
    if twice:
        parser.error(f"--arm, --baselines and --few_baselines name {', '.join(twice)} twice; name every arm once")
    try:
        arms = [arm.name for arm in load_arms(options.arms)]
        parse_seeds(options.seeds)
        parse_budget(f"tokens={options.budget}")
    except UserError as error:
        parser.error(str(error))
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1")
    if not all("=" in text for text in options.set):
        parser.error("--set must be KEY=VALUE")
    options.set = dict(text.split("=", 1) for text in options.set)
    options.points = options.points.split(",")
    points = [point.name for point in POINTS]
    for option, names, allowed in (
        ("--points", options.points, points),
        ("--arm", [options.arm], arms),
        ("--baselines", options.baselines, arms),
        ("--few_baselines", options.few_baselines, arms),
    ):
        unknown = sorted(set(names) - set(allowed))
        if unknown:
            parser.error(f"{option}: unknown {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    chosen_by_tasks = {key for point in POINTS if point.name in options.points for key in point.settings}
    if refused := sorted((chosen_by_tasks | {"run.save_rollouts"}) & set(options.set)):
        parser.error(f"--set {refused[0]}: the tasks of the map choose it; leave it out")
    return options


def main() -> None:
    """Train on every task of the map, and write the results."""
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    entries: dict[str, dict[str, Any]] = {}
    for point in POINTS:
        if point.name in options.points:
            entries[point.name] = _entry(point, options, _compare(point, options))
            document = {
                "command": options.command,
                "arm": options.arm,
                "baselines": options.baselines,
                "few_baselines": options.few_baselines,
                "over_tasks": _over_tasks(entries),
                "points": entries,
            }
            (options.out / "map.json").write_text(json.dumps(document, indent=1) + "\n")
            (options.out / "map.md").write_text(_table(entries, options))
    _picture(entries, options, options.out / "map.png")
    print(_table(entries, options))


if __name__ == "__main__":
    main()
