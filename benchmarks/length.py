"""Measure how the cost of VinePPO's credit grows with the length of a response, the group size, K and the model size.

    python benchmarks/length.py --out runs/length

The cost is the seconds, the generated tokens and the peak memory for estimating the values of the states of responses
to one problem. A model writes responses of 10 to 500 steps of a few tokens each. The reward depends only on two steps,
at one third and two thirds of the response. Bisection is intended for such responses. Every method estimates values of
the same responses:

    fixed_k      K new continuations of every state, as in the paper
    reuse        continuations that count for several states (vineppo.reuse)
    bisection    only the states around decisive steps, with reuse (vineppo.bisection and vineppo.reuse)
    generate     fixed_k with transformers' `generate` instead of the sampler of this package

The model (`vineppo.measure.longchain`) has random weights and a vocabulary of five tokens. Like those of trained
models, its continuations stay near the response: all have the same length, and one token has a probability of about
0.96 in every state, so the entropy is about 0.2 nats per token (the measured entropy is in length.json). Its shape
(`build_policy`) makes the share of attention in the computation about that of TinyLlama-1.1B.

Tokens and seconds are modelled as proportional to (number of steps)^exponent. The exponent is fitted to the numbers of
at least 50 steps. Small sweeps give the exponents of the group size G, K and the number of parameters in the same way,
at `--sweep-steps` steps. The seconds with larger models on GPUs are predicted from the token counts and from data
sheets, as in `vineppo scaling`. The script writes length.json and length.md. With `--report`, it measures nothing and
only writes length.md again from length.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # This makes the folder `benchmarks` importable.

from benchmarks.engines import generate, peak_memory

from vineppo.measure.gpus import ASSUMPTIONS, gpu_rows
from vineppo.measure.longchain import Scene, build_policy, build_scene, fixed_tokens
from vineppo.measure.scaling import METHODS as CREDIT_METHODS
from vineppo.measure.scaling import share_of_tokens
from vineppo.measure.scaling_report import larger_models
from vineppo.model.policy import Policy
from vineppo.sampling.build import sampler_line

METHODS = ("bisection", "reuse", "fixed_k", "generate")
FIT_FROM = 50
"""The exponents of the length are fitted to the measurements with at least this number of steps."""
SWEEPS = {"group": (1, 2, 4, 8), "k": (1, 3, 9), "width": (144, 288, 576)}
"""Quantity -> its values in a small sweep. The width is the hidden size of the model."""
ENOUGH_SECONDS = 30.0
"""When the runs of a row have taken this time, there is no further run."""
SWEEP_PROBLEMS = 2
"""Number of problems in the sweeps."""
GPUS = ("a100", "h100")
"""The accelerators of the table of larger models."""


def measure(scene: Scene, method: str, folder: Path) -> dict[str, float]:
    """Measure the cost of the credit once.

    Args:
        method: one of METHODS.
        folder: an existing folder in which the model can be saved.
    Returns:
        `seconds`, `tokens` (number of generated tokens) and, except for `generate`, `states` (number of different
        states that were evaluated). Each is a mean over the problems of the scene.
    """
    num_problems = len(scene.groups)
    if method == "generate":
        work = generate_work(scene, folder)
        run = generate(work)
        start = time.perf_counter()
        tokens = run()
        return {"seconds": (time.perf_counter() - start) / num_problems, "tokens": tokens / num_problems}
    credit = scene.credit(method)
    start = time.perf_counter()
    _, metrics = credit(scene.groups, 0)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds / num_problems,
        "tokens": metrics["tokens/mc"] / num_problems,
        "states": metrics["credit/distinct_states"] / num_problems,
    }


def measured_row(scene: Scene, method: str, repeats: int, labels: dict[str, Any]) -> dict[str, Any]:
    """Measure a scene several times, print one line, and return the row of length.json.

    Args:
        repeats: largest number of runs. The seconds are their median. There are no more runs after ENOUGH_SECONDS.
        labels: what the row says about the scene, such as `steps`.
    """
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(runs) < repeats and sum(run["seconds"] for run in runs) * len(scene.groups) < ENOUGH_SECONDS:
            runs.append(measure(scene, method, Path(folder)))
    row: dict[str, Any] = {
        "method": method,
        **labels,
        "problems": len(scene.groups),
        "runs": len(runs),
        **runs[0],
        "bytes": peak_memory(os.getpid()),
    }
    row["seconds"] = median(run["seconds"] for run in runs)
    text = ", ".join(f"{name} {value}" for name, value in labels.items())
    print(f"{method:10} {text:28} {row['tokens']:12,.0f} tokens {row['seconds']:9.3f} s", flush=True)
    return row


def length_rows(policy: Policy, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row for each method and number of steps.

    There are `--responses` responses. For all methods except bisection, there are fewer if fixed K would need more than
    --max-tokens for all of them (--max-generate-tokens for `generate`), but at least one. `generate` is left out for a
    length at which one response needs more than twice that number.
    """
    for method in arguments.methods:
        for num_steps in arguments.steps:
            needed, responses = fixed_tokens(num_steps, arguments.step_tokens, arguments.k), arguments.responses
            if method != "bisection":
                limit = arguments.max_generate_tokens if method == "generate" else arguments.max_tokens
                responses = max(1, min(responses, int(limit / needed)))
            if method == "generate" and needed > 2 * limit:
                print(f"{method:10} steps {num_steps}: left out, {needed:,} tokens", flush=True)
                continue
            scene = build_scene(policy, num_steps, (responses, 1, arguments.k), arguments.step_tokens)
            labels = {"steps": num_steps}
            row = measured_row(scene, method, arguments.repeats, labels)
            yield {**row, "entropy": scene.entropy, "mean_reward": scene.mean_reward}


def sweep_rows(policy: Policy, name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row for each method, except `generate`, and each value of a sweep.

    Args:
        policy: the model of the sweeps over G and K.
        name: a quantity of SWEEPS. The sweep over widths has rows with the number of `parameters`.
    """
    num_steps, tokens = arguments.sweep_steps, arguments.sweep_steps * arguments.step_tokens
    for method in (m for m in arguments.methods if m != "generate"):
        for value in SWEEPS[name]:
            model = build_policy(tokens, value) if name == "width" else policy
            shape = SWEEP_PROBLEMS, value if name == "group" else 1, value if name == "k" else arguments.k
            scene = build_scene(model, num_steps, shape, arguments.step_tokens)
            labels = {name: value}
            if name == "width":
                labels = {"parameters": sum(weight.numel() for weight in model.model.parameters())}
            yield measured_row(scene, method, arguments.repeats, labels)


def generate_work(scene: Scene, folder: Path) -> dict[str, Any]:
    """Return the workload of fixed K in the form that `engines.generate` expects.

    Args:
        folder: an existing folder. The model is saved in its subfolder `model`.
    """
    scene.policy.model.save_pretrained(folder / "model")
    rollouts = [rollout for group in scene.groups for rollout in group.rollouts]
    cuts = range(0, scene.budget, scene.problems.step_tokens)
    return {
        "model": str(folder / "model"),
        "dtype": "float32",
        "prefixes": [list(r.prompt_ids + r.response_ids[:cut]) for r in rollouts for cut in cuts],
        "lengths": [[scene.budget - cut] * scene.k for _ in rollouts for cut in cuts],
    }


def fitted(rows: Sequence[dict[str, Any]], column: str, over: str = "steps", least: float = FIT_FROM) -> float | None:
    """Fit the exponent of a method, that is, the slope of log(column) as a function of log(over).

    Args:
        rows: the results of the method, one per value of `over`.
        column: `tokens` or `seconds`.
        over: name of the quantity that varies.
        least: rows with a smaller value of `over` are ignored, and so are rows without tokens.
    Returns:
        The exponent, or None if fewer than two rows remain.
    """
    points = [(row[over], row[column]) for row in rows if row[over] >= least and row[column] > 0]
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def exponents_of(rows: Sequence[dict[str, Any]], over: str, least: float) -> dict[str, dict[str, float | None]]:
    """Return method -> {"tokens": exponent, "seconds": exponent} of the rows (see `fitted`)."""
    by_method = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    return {
        method: {column: fitted(own, column, over, least) for column in ("tokens", "seconds")}
        for method, own in by_method.items()
        if own
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the text of length.md.

    Args:
        result: the content of length.json.
    """
    lines = [
        "# Cost of the credit of one response over its length",
        "",
        f"`{result['command']}` on {result['platform']}, {result['threads']} threads, {result['sampler']}: "
        f"K = {result['k']}, {result['step_tokens']} tokens per step, a model with {result['parameters']:,} parameters "
        f"and an entropy of {result['entropy']:.2f} nats per token, medians of up to {result['repeats']} runs (fewer "
        f"after {ENOUGH_SECONDS:.0f} s). Tokens and seconds are those of one response, the mean over several. Peak "
        "memory is the process's largest so far; the methods ran in the order of the table. `bisection` is with reuse.",
        "",
        "| method | steps | responses | measured states | tokens | seconds | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        states = f"{row['states']:.1f}" if "states" in row else str(row["steps"])
        lines.append(
            f"| {row['method']} | {row['steps']} | {row['problems']} | {states} | {row['tokens']:,.0f} | "
            f"{row['seconds']:.3f} | {row['bytes'] / 2**20:.0f} MiB |"
        )
    lines += ["", f"Exponents from {FIT_FROM} steps on:", "", *exponent_table(result["exponents"])]
    for name, sweep in result["sweeps"].items():
        over = {"group": "group size G (cost of all responses to a problem)", "k": "K", "width": "number of parameters"}
        rows = sweep["rows"]
        column = "parameters" if name == "width" else name
        values = ", ".join(f"{value:,}" for value in dict.fromkeys(row[column] for row in rows))
        lines += ["", f"Exponents over the {over[name]}, {values}, at {result['sweep_steps']} steps:", ""]
        lines += exponent_table(sweep["exponents"])
    return "\n".join([*lines, "", *larger_models(predictions(result), ASSUMPTIONS)])


def predictions(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the credit costs with larger models on GPUs, from the measured token counts (see `gpu_rows`)."""
    rows, k, step_tokens = result["rows"], result["k"], result["step_tokens"]
    measured = [method for method in CREDIT_METHODS if any(row["method"] == method for row in rows)]
    return gpu_rows(GPUS, k, {method: share_of_tokens(rows, method, k, step_tokens) for method in measured})


def exponent_table(exponents: dict[str, dict[str, float | None]]) -> list[str]:
    """Return the lines of a table with the exponents of each method."""
    lines = ["| method | tokens | seconds |", "|---|---|---|"]
    for method, columns in exponents.items():
        cells = ["-" if (value := columns[name]) is None else f"{value:.2f}" for name in ("tokens", "seconds")]
        lines.append(f"| {method} | {cells[0]} | {cells[1]} |")
    return lines


def parsed_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="10,50,100,200,500", help="numbers of steps per response")
    parser.add_argument("--step-tokens", type=int, default=3, help="tokens per step")
    parser.add_argument("--responses", type=int, default=32, help="largest number of responses per length")
    parser.add_argument("--k", type=int, default=9, help="K: continuations per state")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--max-tokens", type=float, default=1e6, help="fewer responses if fixed_k needs more")
    parser.add_argument("--max-generate-tokens", type=float, default=1e5, help="the same for `generate`")
    parser.add_argument("--sweeps", default=",".join(SWEEPS), help="empty: none")
    parser.add_argument("--sweep-steps", type=int, default=50, help="number of steps in the sweeps")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs per median")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/length"))
    parser.add_argument("--report", action="store_true", help="only write length.md again, from OUT/length.json")
    arguments = parser.parse_args()
    if arguments.report and not (arguments.out / "length.json").is_file():
        parser.error(f"--report needs {arguments.out / 'length.json'}, which does not exist; measure without --report")
    for option, allowed in (("methods", METHODS), ("sweeps", tuple(SWEEPS))):
        chosen = [name for name in getattr(arguments, option).split(",") if name]
        if unknown := set(chosen) - set(allowed):
            parser.error(f"--{option} has {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
        setattr(arguments, option, [name for name in allowed if name in chosen])
    arguments.steps = [int(n) for n in arguments.steps.split(",")]
    return arguments


def main() -> None:
    """Run the measurements and write the results, or only write the report again."""
    arguments = parsed_arguments()
    if arguments.report:
        (arguments.out / "length.md").write_text(markdown(json.loads((arguments.out / "length.json").read_text())))
        return
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    policy = build_policy(max([*arguments.steps, arguments.sweep_steps]) * arguments.step_tokens)
    rows = list(length_rows(policy, arguments))
    sweeps = {}
    for name in arguments.sweeps:
        own = list(sweep_rows(policy, name, arguments))
        sweeps[name] = {"exponents": exponents_of(own, "parameters" if name == "width" else name, 0), "rows": own}
    exponents = exponents_of(rows, "steps", FIT_FROM)
    result = {
        "command": " ".join(["python", "benchmarks/length.py", *sys.argv[1:]]),
        "exponent": exponents.get("bisection", {}).get("seconds"),
        "k": arguments.k,
        "step_tokens": arguments.step_tokens,
        "sweep_steps": arguments.sweep_steps,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "platform": platform.platform(),
        "sampler": sampler_line(policy, "auto"),
        "parameters": sum(weight.numel() for weight in policy.model.parameters()),
        "entropy": float(np.mean([row["entropy"] for row in rows])) if rows else math.nan,
        "exponents": exponents,
        "sweeps": sweeps,
        "rows": rows,
    }
    (arguments.out / "length.json").write_text(json.dumps(result, indent=1))
    (arguments.out / "length.md").write_text(markdown(result))
    print("\n" + markdown(result))


if __name__ == "__main__":
    main()
