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

The model has random weights and a vocabulary of five tokens. Like those of trained models, its continuations stay near
the response: all have the same length, and one token has a probability of about 0.96 in every state, so the entropy is
about 0.2 nats per token (the measured entropy is in length.json). Its shape (`build_policy`) makes the share of
attention in the computation about that of TinyLlama-1.1B.

Tokens and seconds are modelled as proportional to (number of steps)^exponent. The exponent is fitted to the numbers of
at least 50 steps. Small sweeps give the exponents of the group size G, K and the number of parameters in the same way,
at `--sweep-steps` steps. The script writes length.json and length.md.
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
from vineppo.model.location import resolve_model_path
from vineppo.model.policy import Policy
from vineppo.sampling.build import build_sampler, sampler_line
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.judge import InProcess
from vineppo.training.rollouts import sample_groups
from vineppo.types import Completion, CreditFn, Problem, RolloutGroup, SampleRequest, Split, Task
from vineppo.values import MonteCarlo

METHODS = ("bisection", "reuse", "fixed_k", "generate")
FIT_FROM = 50
"""The exponents of the length are fitted to the measurements with at least this number of steps."""
SWEEPS = {"group": (1, 2, 4, 8), "k": (1, 3, 9), "width": (144, 288, 576)}
"""Quantity -> its values in a small sweep. The width is the hidden size of the model."""
ENOUGH_SECONDS = 30.0
"""When the runs of a row have taken this time, there is no further run."""
SWEEP_PROBLEMS = 2
"""Number of problems in the sweeps."""
WIDTH = 288
"""Hidden size of the model outside the sweep over widths."""
USUAL = 1
"""Id of the token that is likely in every state; the letter "a"."""
CANDIDATES = 2
"""Number of responses that are sampled for each response whose cost is measured."""
LIKELY = 0.96
"""Probability of this token, up to the noise of the random weights."""


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

    The reward is 1 if both steps consist of the likely token only, else 0. Implements `types.ProblemSource`.
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
        """Return 1 for each completion whose two steps consist of the letter of the likely token, else 0."""
        n = self.step_tokens
        starts = [self.num_steps * third // 3 * n for third in (1, 2)]
        right = ("x" + LETTERS)[USUAL] * n
        return [float(all(text[start : start + n] == right for start in starts)) for text in completions]

    def task(self) -> Task:
        """Return a task with these problems, graded by `reward`."""
        return Graded(self, InProcess((self.reward,)), ("reward",), (1.0,))


def build_policy(max_tokens: int, width: int = WIDTH) -> Policy:
    """Build a Llama with random weights, a vocabulary of five tokens, and one likely token.

    With two layers of width 288, intermediate size 1152, and 2 heads and 1 key-value head of size 24, attention over
    11,000 positions takes as many products as the matrices of a layer. In TinyLlama-1.1B, the shape of the smaller
    model of the paper, this number is 10,800, in SmolLM2-135M 3,100. In the embedded models it is 600, so their costs
    grow faster with the length than those of models that are used.

    Args:
        max_tokens: maximum number of tokens of a response.
        width: hidden size, a multiple of 144. The intermediate size and the number of heads are proportional to it.
    """
    config = AutoConfig.from_pretrained(resolve_model_path("embedded:judgement"))
    config.vocab_size, config.max_position_embeddings, config.eos_token_id = 1 + len(LETTERS), max_tokens + 16, None
    config.bos_token_id = config.pad_token_id = None
    config.hidden_size, config.intermediate_size, config.tie_word_embeddings = width, 4 * width, False
    config.head_dim, config.num_attention_heads, config.num_key_value_heads = 24, max(1, width // 144), 1
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    prefer_one_token(model)
    return Policy(model, EndlessCodec(build_tokenizer(), eos_ids=(), max_length=max_tokens + 16))


@torch.no_grad()
def prefer_one_token(model: LlamaForCausalLM) -> None:
    """Change a model so that the token USUAL has a probability of about LIKELY in every state.

    The first number of all embeddings becomes large, so the first number of every hidden state is nearly the same. The
    first column of the output matrix multiplies this number, and so acts like a bias of the logits. Its size follows
    from the mean of this number over 256 random tokens. The other columns keep their random weights: the probabilities
    still depend on the whole prefix, a little.
    """
    embeddings, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embeddings[:, 0] = 8 * embeddings.shape[1] ** 0.5 * embeddings[:, 1:].std()
    hidden = model.model(torch.randint(len(output), (1, 256))).last_hidden_state  # (1, 256, hidden)
    output[:, 0] = 0
    output[USUAL, 0] = math.log(LIKELY / (1 - LIKELY) * (len(output) - 1)) / hidden[..., 0].mean()


@dataclass(frozen=True)
class Scene:
    """Responses with one number of steps, and everything that is needed to estimate the values of their states."""

    policy: Policy
    problems: TwoDecisions
    sampler: FullLengthSampler
    groups: list[RolloutGroup]
    """The responses as rollouts, one group per problem."""
    k: int
    """K, the number of continuations per state."""

    @property
    def budget(self) -> int:
        """Number of tokens of a response."""
        return self.problems.num_steps * self.problems.step_tokens

    @property
    def entropy(self) -> float:
        """Estimate of the entropy per token in nats: the negative mean log-probability of the response tokens."""
        rollouts = [rollout for group in self.groups for rollout in group.rollouts]
        return -float(np.mean([rollout.sampler_logprobs for rollout in rollouts]))

    @property
    def mean_reward(self) -> float:
        """Mean reward of the responses."""
        return float(np.mean([rollout.reward or 0.0 for group in self.groups for rollout in group.rollouts]))

    def credit(self, method: str) -> CreditFn:
        """Return the credit function of one of METHODS, except for `generate`, which is measured without one."""
        estimator = MonteCarlo(
            self.sampler, self.problems.task(), self.policy.codec.decode, self.k, self.budget, run_seed=0, temperature=1
        )
        settings = VinePPOSettings(
            num_mc_rollouts=self.k,
            splitter=f"tokens:{self.problems.step_tokens}",
            max_states=0,
            reuse=method in ("reuse", "bisection"),
            bisection=method == "bisection",
        )
        return build_vine_credit(settings, estimator, self.policy.codec)


def fixed_tokens(num_steps: int, step_tokens: int, k: int) -> int:
    """Return the number of tokens in K new continuations of every state of one response."""
    return k * step_tokens * num_steps * (num_steps + 1) // 2


def build_scene(policy: Policy, num_steps: int, shape: tuple[int, int, int], step_tokens: int) -> Scene:
    """Sample responses with this number of steps.

    If there is one response per problem, a quarter of the responses have the reward 0 (see `quarter_wrong`).

    Args:
        policy: the model that writes the responses.
        num_steps: number of steps of each response.
        shape: (number of problems, responses per problem, K).
        step_tokens: number of tokens of a step.
    """
    num_problems, group_size, k = shape
    problems = TwoDecisions(num_steps, step_tokens)
    sampler = FullLengthSampler(build_sampler(policy, "auto"))
    groups = sample_groups(
        [problems.problem("train", index) for index in range(num_problems * (1 if group_size > 1 else CANDIDATES))],
        policy.codec,
        sampler,
        problems.task(),
        group_size=group_size,
        max_new_tokens=num_steps * step_tokens,
        temperature=1.0,
        address=(0, "length"),
    )
    return Scene(policy, problems, sampler, quarter_wrong(groups, num_problems), k)


def quarter_wrong(groups: Sequence[RolloutGroup], count: int) -> list[RolloutGroup]:
    """Return the first `count` groups of which, if possible, a quarter has a first response with the reward 0.

    Bisection evaluates more states of wrong responses than of right ones. With the same share at every length, its cost
    does not depend on how many responses happen to be wrong.
    """
    wrong = [group for group in groups if not group.rollouts[0].reward]
    right = [group for group in groups if group.rollouts[0].reward]
    num_wrong = max(min(count // 4, len(wrong)), count - len(right))
    return wrong[:num_wrong] + right[: count - num_wrong]


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
    return "\n".join(lines) + "\n"


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
    arguments = parser.parse_args()
    for option, allowed in (("methods", METHODS), ("sweeps", tuple(SWEEPS))):
        chosen = [name for name in getattr(arguments, option).split(",") if name]
        if unknown := set(chosen) - set(allowed):
            parser.error(f"--{option} has {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
        setattr(arguments, option, [name for name in allowed if name in chosen])
    arguments.steps = [int(n) for n in arguments.steps.split(",")]
    return arguments


def main() -> None:
    """Run the measurements and write the results."""
    arguments = parsed_arguments()
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
