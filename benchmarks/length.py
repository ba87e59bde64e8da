"""Measure how the cost of VinePPO's credit for one response grows with the number of steps of the response.

    python benchmarks/length.py --out runs/length

The cost is the seconds, the generated tokens and the peak memory for estimating the values of the response's states. A
model with the architecture of the embedded model, random weights and a longer context writes responses of 10 to 500
steps of a few tokens each. The reward depends only on two steps, at one third and two thirds of the response.
Bisection is intended for such responses. Every method estimates values of the same responses:

    fixed K      K new continuations of every state, as in the paper
    reuse        continuations that count for several states (vineppo.reuse)
    bisection    K new continuations only of the states around decisive steps (vineppo.bisection)
    generate     fixed K with transformers' `generate` instead of the sampler of this package

Tokens and seconds are modelled as proportional to (number of steps)^exponent. The exponent is fitted to the numbers of
at least 50 steps. If fixed K would generate more than --max-tokens for a number of steps, only bisection is measured.
The script writes length.json and length.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # This makes the folders `benchmarks` and `tests` importable.

from benchmarks.engines import generate, peak_memory
from tests.helpers import WrappedSampler
from tests.world import LETTERS, build_tokenizer
from transformers import AutoConfig, LlamaForCausalLM

from vineppo.credit.vineppo import VinePPOSettings, build_vine_credit
from vineppo.model.codec import Codec
from vineppo.model.loading import resolve_model_path
from vineppo.model.policy import Policy
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.judge import InProcess
from vineppo.training.rollouts import sample_groups
from vineppo.types import Completion, CreditFn, Problem, RolloutGroup, SampleRequest, Split, Task
from vineppo.values import MonteCarlo

METHODS = ("fixed K", "reuse", "bisection", "generate")
FIT_FROM = 50
"""The exponents are fitted to the measurements with at least this number of steps."""


class EndlessCodec(Codec):
    """A codec without end-of-sequence tokens; every token is decoded to one letter."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the tokens, with one letter per token."""
        return "".join(("x" + LETTERS)[token] for token in token_ids)


class FullLengthSampler(WrappedSampler):
    """A sampler that reports all completions as finished ("stop").

    In this benchmark, no token ends a sequence, so every completion has the maximum length. With the finish reason
    "length", its reward would be 0.
    """

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        """Return one list of completions per request, as described in `vineppo.types.Sampler.sample`."""
        return [[replace(c, finish_reason="stop") for c in group] for group in self.sampler.sample(requests)]


@dataclass(frozen=True)
class TwoDecisions:
    """Problems whose reward depends on two steps, at one third and two thirds of the response.

    The reward is 1 if neither of the two steps contains the last letter of LETTERS, else 0. The model has random
    weights, so its responses contain this letter by chance. Implements `types.ProblemSource`.
    """

    num_steps: int
    """Number of steps of a response."""
    step_tokens: int
    """Number of tokens of a step."""

    def size(self, split: Split) -> int | None:
        """Return None, because the number of problems is unlimited."""
        return None

    def problem(self, split: Split, index: int) -> Problem:
        """Return the problem with this index in a split. All problems have the same prompt."""
        return Problem(id=f"{split}/{index}", prompt="ab")

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """Raise NotImplementedError, because this benchmark needs no demonstrations."""
        raise NotImplementedError

    def reward(self, completions: Sequence[str], **_: Any) -> list[float]:
        """Return 1 for each completion in which neither of the two steps contains the last letter, else 0."""
        n = self.step_tokens
        starts = [self.num_steps * third // 3 * n for third in (1, 2)]
        return [float(all(LETTERS[-1] not in text[start : start + n] for start in starts)) for text in completions]

    def task(self) -> Task:
        """Return a task with these problems, graded by `reward`."""
        return Graded(self, InProcess((self.reward,)), ("reward",), (1.0,))


def build_policy(max_tokens: int) -> Policy:
    """Build a policy with the architecture of the embedded model, random weights and a vocabulary of five tokens.

    Args:
        max_tokens: maximum number of tokens of a response.
    """
    config = AutoConfig.from_pretrained(resolve_model_path("embedded:judgement"))
    config.vocab_size, config.max_position_embeddings, config.eos_token_id = 1 + len(LETTERS), max_tokens + 16, None
    config.bos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    return Policy(LlamaForCausalLM(config), EndlessCodec(build_tokenizer(), eos_ids=(), max_length=max_tokens + 16))


@dataclass(frozen=True)
class Scene:
    """Responses with one number of steps, and everything that is needed to estimate the values of their states."""

    policy: Policy
    problems: TwoDecisions
    sampler: FullLengthSampler
    groups: list[RolloutGroup]
    """The responses as rollouts, one per group."""
    k: int
    """K, the number of continuations per state."""

    @property
    def budget(self) -> int:
        """Number of tokens of a response."""
        return self.problems.num_steps * self.problems.step_tokens

    def credit(self, method: str) -> CreditFn:
        """Return the credit function of one of METHODS, except for `generate`, which is measured without one."""
        estimator = MonteCarlo(
            self.sampler, self.problems.task(), self.policy.codec.decode, self.k, self.budget, run_seed=0, temperature=1
        )
        settings = VinePPOSettings(
            num_mc_rollouts=self.k,
            splitter=f"tokens:{self.problems.step_tokens}",
            max_states=0,
            reuse=method == "reuse",
            bisection=method == "bisection",
        )
        return build_vine_credit(settings, estimator, self.policy.codec)

    def fixed_tokens(self) -> int:
        """Return the number of tokens in K new continuations of every state of all responses."""
        rollouts = sum(len(group.rollouts) for group in self.groups)
        return (
            self.k * rollouts * sum(self.budget - start for start in range(0, self.budget, self.problems.step_tokens))
        )


def build_scene(policy: Policy, num_steps: int, arguments: argparse.Namespace) -> Scene:
    """Sample responses with this number of steps.

    Args:
        policy: the model that writes the responses.
        num_steps: number of steps of each response.
        arguments: the parsed command line.
    """
    problems = TwoDecisions(num_steps, arguments.step_tokens)
    sampler = FullLengthSampler(TorchSampler(policy))
    groups = sample_groups(
        [problems.problem("train", index) for index in range(arguments.responses)],
        policy.codec,
        sampler,
        problems.task(),
        group_size=1,
        max_new_tokens=num_steps * arguments.step_tokens,
        temperature=1.0,
        address=(0, "length"),
    )
    return Scene(policy, problems, sampler, groups, arguments.k)


def measure(scene: Scene, method: str, folder: Path) -> dict[str, float]:
    """Measure the cost of the credit once.

    Args:
        method: one of METHODS.
        folder: an existing folder in which the model can be saved.
    Returns:
        `seconds`, `tokens` (number of generated tokens) and, except for `generate`, `states` (number of different
        states that were evaluated). Each is a mean over the responses of the scene.
    """
    responses = len(scene.groups)
    if method == "generate":
        work = generate_work(scene, folder)
        run = generate(work)
        start = time.perf_counter()
        tokens = run()
        return {"seconds": (time.perf_counter() - start) / responses, "tokens": tokens / responses}
    start = time.perf_counter()
    _, metrics = scene.credit(method)(scene.groups, 0)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds / responses,
        "tokens": metrics["tokens/mc"] / responses,
        "states": metrics["credit/distinct_states"] / responses,
    }


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


def fitted(rows: Sequence[dict[str, Any]], column: str) -> float | None:
    """Fit the exponent of a method, that is, the slope of log(column) as a function of log(steps).

    Args:
        rows: the results of the method, one per number of steps.
        column: `tokens` or `seconds`.
    Returns:
        The exponent, or None if fewer than two rows have at least FIT_FROM steps.
    """
    points = [(row["steps"], row[column]) for row in rows if row["steps"] >= FIT_FROM]
    if len(points) < 2:
        return None
    steps, values = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(steps, values, 1)[0])


def markdown(result: dict[str, Any]) -> str:
    """Return the text of length.md.

    Args:
        result: the content of length.json.
    """
    lines = [
        "# Cost of the credit of one response over its length",
        "",
        f"`{result['command']}` on {result['platform']}, {result['threads']} threads: K = {result['k']}, "
        f"{result['step_tokens']} tokens per step, medians of {result['repeats']} runs. Peak memory is the "
        "process's largest so far; the methods ran in the order of the table.",
        "",
        "| method | steps | measured states | tokens | seconds | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        states = f"{row['states']:.1f}" if "states" in row else str(row["steps"])
        lines.append(
            f"| {row['method']} | {row['steps']} | {states} | {row['tokens']:,.0f} | {row['seconds']:.3f} | "
            f"{row['bytes'] / 2**20:.0f} MiB |"
        )
    lines += [
        "",
        f"Exponents from {FIT_FROM} steps on:",
        "",
        "| method | tokens | seconds |",
        "|---|---|---|",
    ]
    for method, exponents in result["exponents"].items():
        cells = ["-" if exponents[name] is None else f"{exponents[name]:.2f}" for name in ("tokens", "seconds")]
        lines.append(f"| {method} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the arguments, run the measurements and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="10,50,100,200,500", help="numbers of steps per response")
    parser.add_argument("--step-tokens", type=int, default=4, help="tokens per step")
    parser.add_argument("--responses", type=int, default=8, help="number of responses per length")
    parser.add_argument("--k", type=int, default=9, help="K: continuations per state")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--max-tokens", type=float, default=2e6, help="above this, measure only bisection")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs per median")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/length"))
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods has {', '.join(sorted(unknown))}; allowed: {', '.join(METHODS)}")
    steps = [int(n) for n in arguments.steps.split(",")]
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    policy = build_policy(max(steps) * arguments.step_tokens)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for method in ("bisection", "reuse", "fixed K", "generate"):
            for num_steps in steps if method in methods else ():
                scene = build_scene(policy, num_steps, arguments)
                if method != "bisection" and scene.fixed_tokens() > arguments.max_tokens:
                    break
                runs = [measure(scene, method, Path(folder)) for _ in range(arguments.repeats)]
                row = {"method": method, "steps": num_steps, **runs[0], "bytes": peak_memory(os.getpid())}
                row["seconds"] = median(run["seconds"] for run in runs)
                rows.append(row)
                print(
                    f"{method:10} {num_steps:4} steps {row['tokens']:12,.0f} tokens {row['seconds']:9.3f} s", flush=True
                )
    exponents = {
        method: {name: fitted([r for r in rows if r["method"] == method], name) for name in ("tokens", "seconds")}
        for method in methods
    }
    result = {
        "command": " ".join(["python", "benchmarks/length.py", *sys.argv[1:]]),
        "exponent": exponents.get("bisection", {}).get("seconds"),
        "k": arguments.k,
        "step_tokens": arguments.step_tokens,
        "responses": arguments.responses,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "platform": platform.platform(),
        "exponents": exponents,
        "rows": rows,
    }
    (arguments.out / "length.json").write_text(json.dumps(result, indent=1))
    (arguments.out / "length.md").write_text(markdown(result))
    print("\n" + markdown(result))


if __name__ == "__main__":
    main()
