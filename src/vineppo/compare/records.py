"""Read the metrics, evaluations and settings of the finished runs of a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vineppo.run.directory import RunDirectory


@dataclass(frozen=True)
class Evaluation:
    """The accuracy at one evaluation during a run, and the resources that the run had used by then."""

    updates: float
    """Number of optimizer updates since the start of the run."""
    tokens: float
    """Number of tokens generated for training since the start of the run, in rollouts and MC rollouts."""
    trained: float
    """Number of trained tokens since the start of the run, counted in every epoch."""
    seconds: float
    """Seconds of training since the start of the run, without evaluation."""
    accuracy: float
    """Accuracy on the validation problems, between 0 and 1 (the metric `eval/accuracy`)."""
    kl: float | None
    """KL divergence of the evaluated policy from the starting model in nats per response, or None if it was not
    measured: an iteration measures it before its updates (`kl/ref`), so it is not known after the last iteration."""


@dataclass(frozen=True)
class RunRecord:
    """The data of one finished run that the analysis uses."""

    arm: str
    """Name of the arm."""
    seed: int
    """Seed of the run."""
    summary: dict[str, Any]
    """The content of `summary.json`."""
    evaluations: tuple[Evaluation, ...]
    """Evaluations during the run, ordered by number of updates."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved settings of the run, as nested dictionaries: the content of `config.yaml`."""
    level: str = ""
    """Text that names the problems in titles of plots: `task.level` if the task is `chain`, else `task.name`."""

    @property
    def ends(self) -> tuple[Evaluation, ...]:
        """The accuracies before and after training (on `eval.split`), or nothing if one of them was not measured."""
        before, after = (number_in(self.summary, f"accuracy_{when}", "mean") for when in ("before", "after"))
        if before is None or after is None:
            return ()
        keys = (("updates",), ("tokens", "generated"), ("tokens", "trained"), ("seconds",))
        updates, tokens, trained, seconds = (number_in(self.summary, *key) or 0.0 for key in keys)
        end = Evaluation(updates, tokens, trained, seconds, after, None)
        return (Evaluation(0.0, 0.0, 0.0, 0.0, before, None), end)


def load_run(directory: Path, arm: str = "") -> RunRecord:
    """Read the files `summary.json`, `metrics.jsonl` and `config.yaml` of a finished run.

    Args:
        directory: directory of the run.
        arm: name of its arm; by default, the name of its algorithm.
    Raises:
        UserError: if a file is damaged.
    """
    run = RunDirectory.open(directory, writable=False)
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    task = run.config.get("task", {})
    level = task.get("level", "") if task.get("name") == "chain" else task.get("name", "")
    evaluations = evaluations_of(run.read_metrics())
    return RunRecord(arm or summary["algorithm"], int(summary["seed"]), summary, evaluations, run.config, level)


def evaluations_of(lines: Sequence[dict[str, Any]]) -> tuple[Evaluation, ...]:
    """Return the evaluations in the lines of metrics.jsonl, ordered by number of updates.

    An iteration measures `kl/ref` before its updates and the accuracy after them. So the KL divergence that belongs to
    an accuracy is in the next line.
    """
    following = [*lines, {}][1:]
    evaluations = [
        _evaluation(line, after.get("kl/ref"))
        for line, after in zip(lines, following, strict=True)
        if line.get("eval/accuracy") is not None
    ]
    # Several evaluations can have the same number of updates, but a curve has one accuracy for each. Keep the last one.
    unique = {evaluation.updates: evaluation for evaluation in evaluations}
    return tuple(unique[updates] for updates in sorted(unique))


def _evaluation(record: dict[str, Any], kl: float | None) -> Evaluation:
    """Convert a line of metrics.jsonl to an evaluation.

    Args:
        record: the line as a dictionary. It must have an accuracy.
        kl: KL divergence of the evaluated policy, or None if it was not measured.
    """
    return Evaluation(
        updates=float(record["updates"]),
        tokens=float(record.get("tokens/generated", 0)),
        trained=float(record.get("tokens/trained", 0)),
        seconds=float(record.get("seconds/train", 0)),
        accuracy=float(record["eval/accuracy"]),
        kl=None if kl is None else float(kl),
    )


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that determine its batches and steps: short name -> value, None if unknown."""
    keys = {
        "num_problems": "rollouts.num_problems",
        "group_size": "rollouts.group_size",
        "minibatch_size": "learner.minibatch_size",
        "epochs": "learner.epochs",
        "lr": "learner.lr",
        "kl": "learner.kl.coefficient",
    }
    return {name: setting_in(config, key) for name, key in keys.items()}


def setting_in(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key in nested dictionaries, or None if it is missing."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def number_in(record: dict[str, Any], *keys: str) -> float | None:
    """Return the number at `record[key1][key2]...` for any number of keys, or None if it is missing or not finite."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
