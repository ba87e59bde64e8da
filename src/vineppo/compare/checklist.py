"""Answer the questions that a reader of a comparison asks, from the comparison's own records, for `table.md`."""

from __future__ import annotations

from typing import Any

from vineppo.compare.tables import format_count, format_interval, missing_lines


def checklist(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the checklist of a comparison as pairs (item, answer).

    Args:
        result: the content of `compare.json`.
    """
    spec, arms = result["spec"], result["arms"]
    missing = missing_lines(result)
    return [
        ("model", _model(spec["common"])),
        ("task and splits", _task(spec)),
        ("seeds", f"{_listed(spec['seeds'])}, the same for every arm"),
        ("runs finished", _per_arm(arms, lambda f: f"{f['num_runs']} of {len(spec['seeds'])}")),
        ("runs failed, stopped or skipped", "; ".join(missing) or "none"),
        ("batch and step size", _per_arm(arms, _shape)),
        ("settings of single arms", _per_arm(arms, _settings)),
        ("tuning: combinations of settings tried", _per_arm(arms, _cells)),
        ("budget of each run", _budget(spec["budget"])),
        ("tokens of a run", _per_arm(arms, _tokens)),
        ("decoding in the evaluation", _decoding(spec["common"])),
        (
            "accuracy before and after, sampled",
            _per_arm(arms, lambda f: _change(f, "accuracy_before", "final_accuracy")),
        ),
        ("accuracy before and after, greedy", _per_arm(arms, lambda f: _change(f, "greedy_before", "greedy_after"))),
        ("intervals", "95%: Student's t over seeds for means and paired differences, log-ratio t for ratios"),
        ("baselines", ", ".join(result["baselines"]) or "none"),
        ("hardware and software", _hardware(result)),
    ]


def _model(common: dict[str, Any]) -> str:
    if not common:
        return "unknown: no run has finished"
    return f"{common['model.path']}, {common['model.dtype']}, trained on {common['model.device']}"


def _task(spec: dict[str, Any]) -> str:
    common = spec["common"]
    if not common:
        return "unknown: no run has finished"
    name = common["task.name"]
    if name == "chain":
        name += f" {common['task.level']}, {common['task.num_steps']} steps"
    final = f"{common['eval.final_num_problems']} {common['eval.split']} problems before and after training"
    during = f"{common['eval.num_problems']} validation problems during training, "
    return f"{name}; {'' if common.get('eval.every') == 0 else during}{final}"


def _listed(seeds: list[int]) -> str:
    """Return `3 to 7` for consecutive seeds, else the seeds themselves."""
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _per_arm(arms: dict[str, Any], answer: Any) -> str:
    """Return the answers of the arms, each with the name of its arm; one answer if it is the same for all arms."""
    answers = {name: answer(figures) for name, figures in arms.items()}
    if len(set(answers.values())) == 1:
        return next(iter(answers.values()))
    return "; ".join(f"{name}: {text}" for name, text in answers.items())


def _shape(figures: dict[str, Any]) -> str:
    shape = figures["shape"]
    if not shape or shape["num_problems"] is None:
        return "unknown"
    epochs = f"{shape['epochs']} epoch{'' if shape['epochs'] == 1 else 's'}"
    return (
        f"{shape['num_problems']} problems x {shape['group_size']}, minibatch {shape['minibatch_size']}, {epochs}, "
        f"lr {shape['lr']:g}, KL {shape['kl']:g}"
    )


def _settings(figures: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in figures["settings"].items()) or "none"


def _cells(figures: dict[str, Any]) -> str:
    return "not recorded" if figures["cells"] is None else str(figures["cells"])


def _budget(budget: str) -> str:
    kind, _, amount = budget.partition("=")
    names = {"updates": "updates", "tokens": "generated tokens", "seconds": "seconds of training"}
    return f"{float(amount):,.0f} {names[kind]}"


def _tokens(figures: dict[str, Any]) -> str:
    tokens = figures["tokens"]
    return f"{format_count(tokens['generated'])} generated, {format_count(tokens['trained'])} trained"


def _decoding(common: dict[str, Any]) -> str:
    if not common:
        return "unknown: no run has finished"
    samples, temperature = common["eval.num_samples"], common["eval.temperature"]
    sampled = f"{samples} response{'' if samples == 1 else 's'} per problem at temperature {temperature}"
    greedy = " and 1 greedy response before and after training" if common["eval.greedy"] else ""
    return f"{sampled}{greedy}, at most {common['rollouts.max_new_tokens']} tokens"


def _change(figures: dict[str, Any], before: str, after: str) -> str:
    if figures[before]["mean"] is None and figures[after]["mean"] is None:
        return "not measured"
    return f"{format_interval(figures[before])} -> {format_interval(figures[after])}"


def _hardware(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    jobs = result["spec"]["jobs"]
    return f"{result['platform']}, {result['cpu_count']} cores, {jobs} run(s) at a time; {versions}"
