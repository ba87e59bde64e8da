"""Measure how many tokens each credit method needs to measure the policy gradient of a fixed policy.

    python benchmarks/gradient.py judgement --arm reinforce=algorithm=reinforce \
        --arm vines3=algorithm=vineppo,vineppo.num_mc_rollouts=3 --out runs/gradient

An arm is an algorithm with settings. For each arm, the script samples rollouts of many problems with the policy, lets
the algorithm compute its credit, and computes one gradient per problem: the sum of credit times the gradient of the
log-probability, over the trained tokens and alternatives, divided by the number of responses. Nothing is trained.

For an unbiased arm, the mean of these gradients is the policy gradient mu, and the rest is noise. With n problems, the
signal-to-noise ratio |mu|^2 / (variance / n) is 1 if n = variance / |mu|^2. The main result of an arm is this n times
the number of tokens per problem:

- `tokens_to_snr_1.raw`: in the space of the parameters. With plain gradient descent, this decides.
- `tokens_to_snr_1.adam`: every coordinate is divided by the square root of its second moment in a minibatch of
  REINFORCE, as Adam divides it.

The policy gradient is estimated from all arms together, except those that `--biased NAME` names. The scale c of an
arm, the part of its mean gradient along mu, is 1 for an unbiased arm; the signal of an arm is c * mu. Of a biased arm's
mean gradient, the part that is orthogonal to mu counts as noise. Generated tokens are those of rollouts and MC
rollouts, without those that are taken from drafts. `trained_to_snr_1` and `seconds_to_snr_1` are the same for trained
tokens and for seconds of sampling and credit. Standard errors come from a jackknife over BLOCKS blocks of problems.

`--free NAME` leaves out the tokens of an arm's MC rollouts. With many of them, the arm then shows what a method could
reach at most that has nearly exact values without sampling for them.

The signal-to-noise ratio needs many problems. `tokens_times_square`, the tokens times the mean squared length of a
problem's gradient, is known with fewer. Unbiased arms have the same signal, so its ratio between two of them is the
ratio of their tokens where the noise is much larger than the signal.

The script needs a model with float32 weights, and samples and computes on the CPU. It prints a table and writes
gradient.json and gradient.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vineppo.cli.common import training_config
from vineppo.compare.arms import parse_arm
from vineppo.config.schema import Config
from vineppo.credit.sample import reward_of
from vineppo.model.policy import Policy
from vineppo.training.parts import Parts, build_parts
from vineppo.training.rollouts import draw_problems
from vineppo.types import RolloutGroup, TrainingSample, UserError

BLOCKS = 8
"""Number of blocks of problems."""
PILOT = 512
"""Number of problems whose REINFORCE gradients give the scale of every coordinate (`adam`)."""
MINIBATCH = 64
"""Number of rollouts in the minibatch whose second moment is used as Adam's."""
FLOOR = 0.1
"""The square root of a second moment is at least this share of its median over the coordinates. Coordinates that the
pilot hardly used would otherwise dominate."""

UNITS = ("tokens", "trained", "seconds")
"""What an arm needs for a problem: generated tokens, trained tokens, seconds."""


@dataclass
class Arm:
    """An algorithm with settings, and what has been measured of it."""

    name: str
    overrides: dict[str, str]
    """Dotted key of a setting -> value. The key `algorithm` is required."""
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Sum of the gradients of each block of problems, shape (BLOCKS, D) for D parameters."""
    squares: np.ndarray = field(default_factory=lambda: np.zeros((2, BLOCKS)))
    """Sum over each block of the squared length of a problem's gradient, without and with Adam's scale."""
    problems: np.ndarray = field(default_factory=lambda: np.zeros(BLOCKS))
    """Number of problems in each block."""
    free: bool = False
    """Whether the tokens of MC rollouts are left out."""
    biased: bool = False
    """Whether the arm is left out of the estimate of the policy gradient."""
    generated: float = 0.0
    """Number of generated tokens."""
    trained: float = 0.0
    """Number of trained tokens: response tokens with credit, and alternatives."""
    seconds: float = 0.0
    """Seconds of sampling and credit."""


def config_of(arm: Arm, arguments: argparse.Namespace) -> Config:
    """Return the configuration of an arm. The size of minibatches has no effect, because nothing is trained."""
    overrides = {key: value for key, value in arm.overrides.items() if key != "algorithm"}
    fixed = {
        "run.seed": str(arguments.seed),
        "rollouts.num_problems": str(arguments.batch),
        "learner.minibatch_size": "1",
    }
    if arguments.model:
        fixed["model.path"] = arguments.model
    return training_config(arguments.recipe, {**fixed, **overrides}, arm.overrides["algorithm"])


class Gradients:
    """Computes gradients of log-probabilities with respect to the parameters of a policy.

    Args:
        policy: the policy.
        temperature: the sampling temperature.
    """

    def __init__(self, policy: Policy, temperature: float):
        self.policy, self.temperature = policy, temperature
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)

    def of_samples(self, samples: list[TrainingSample]) -> np.ndarray:
        """Return the sum of credit times gradient of the log-probability over the samples, shape (D,)."""
        used = [s for s in samples if any(s.advantages) or s.alternatives]
        if not used:
            return np.zeros(self.size, np.float32)
        length = max(len(s.token_ids) for s in used)
        ids = torch.zeros(len(used), length, dtype=torch.long)  # (B, T)
        credit = torch.zeros(len(used), length)  # (B, T)
        for row, sample in enumerate(used):
            ids[row, : len(sample.token_ids)] = torch.tensor(sample.token_ids)
            weights = sample.weights or sample.loss_mask
            products = [a * w * m for a, w, m in zip(sample.advantages, weights, sample.loss_mask, strict=True)]
            credit[row, : len(products)] = torch.tensor(products)
        logits = self.policy.model(input_ids=ids, use_cache=False).logits.float() / self.temperature
        logprobs = logits.log_softmax(-1)  # (B, T, V)
        own = logprobs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T - 1)
        total = (own * credit[:, 1:]).sum()
        others = [
            (row, [i for i, trained in enumerate(sample.loss_mask) if trained][other.position] - 1, other)
            for row, sample in enumerate(used)
            for other in sample.alternatives
        ]
        if others:
            places = [[row for row, _, _ in others], [at for _, at, _ in others], [o.token_id for _, _, o in others]]
            total = total + (logprobs[tuple(places)] * torch.tensor([o.advantage for _, _, o in others])).sum()
        parts = torch.autograd.grad(total, self.parameters, allow_unused=True)
        flat = [
            torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
            for g, p in zip(parts, self.parameters, strict=True)
        ]
        return torch.cat(flat).numpy()


def samples_by_group(groups: list[RolloutGroup], samples: list[TrainingSample]) -> list[list[TrainingSample]]:
    """Return the samples of each group. A sample that is no rollout belongs to the group of the sample before it."""
    group_of = {id(rollout): index for index, group in enumerate(groups) for rollout in group.rollouts}
    result: list[list[TrainingSample]] = [[] for _ in groups]
    last = 0
    for sample in samples:
        last = group_of.get(id(sample.rollout), last)
        result[last].append(sample)
    return result


def measure(arm: Arm, arguments: argparse.Namespace, scale: np.ndarray) -> None:
    """Sample rollouts of `--problems` problems, and add their gradients to the arm.

    Args:
        scale: the factor of each coordinate for `adam`, shape (D,).
    """
    config = config_of(arm, arguments)
    parts = build_parts(config)
    parts.update_sampler()
    gradients = Gradients(parts.policy, config.rollouts.temperature)
    arm.sums = np.zeros((BLOCKS, gradients.size))
    for iteration in range(1, arguments.problems // arguments.batch + 1):
        for index, (group, samples) in enumerate(batch_of(parts, arm, arguments, iteration)):
            gradient = gradients.of_samples(samples) / len(group.rollouts)
            block = index % BLOCKS
            arm.sums[block] += gradient
            arm.squares[0, block] += float(gradient @ gradient)
            arm.squares[1, block] += float(((gradient * scale) ** 2).sum())
            arm.problems[block] += 1
    check_blocks(arm)


def check_blocks(arm: Arm) -> None:
    """Raise UserError if so few blocks have a gradient that there is no signal without one of them."""
    used = np.count_nonzero(arm.squares[0])
    if used < 3:
        raise UserError(
            f"arm {arm.name}: {used} of {BLOCKS} blocks of problems have a gradient that is not 0; at least 3 are "
            "needed: raise --problems"
        )


def batch_of(
    parts: Parts, arm: Arm, arguments: argparse.Namespace, iteration: int
) -> list[tuple[RolloutGroup, list[TrainingSample]]]:
    """Sample a batch of problems, compute the credit, and count tokens and seconds.

    Returns:
        One pair (group, its training samples) per problem.
    """
    problems = draw_problems(parts.task, arguments.seed, iteration, arguments.batch)
    start = time.perf_counter()
    groups, sampled = parts.sample(problems, iteration)
    samples, metrics = parts.credit(groups, iteration)
    arm.seconds += time.perf_counter() - start
    arm.generated += sampled + (0.0 if arm.free else metrics.get("tokens/mc", 0.0))
    arm.trained += sum(sum(a != 0 for a in s.advantages) + len(s.alternatives) for s in samples)
    return list(zip(groups, samples_by_group(groups, list(samples)), strict=True))


def adam_scale(arguments: argparse.Namespace) -> tuple[np.ndarray, float]:
    """Return (factor of each coordinate, mean reward) from the REINFORCE gradients of PILOT problems."""
    arm = Arm("pilot", {"algorithm": "reinforce"})
    pilot = argparse.Namespace(**{**vars(arguments), "seed": arguments.seed + 1_000_003})
    config = config_of(arm, pilot)
    parts = build_parts(config)
    parts.update_sampler()
    gradients = Gradients(parts.policy, config.rollouts.temperature)
    first, second = np.zeros(gradients.size), np.zeros(gradients.size)
    rewards, count = [], 0
    for iteration in range(1, PILOT // arguments.batch + 1):
        for group, samples in batch_of(parts, arm, pilot, iteration):
            gradient = gradients.of_samples(samples) / len(group.rollouts)
            first, second = first + gradient, second + gradient.astype(np.float64) ** 2
            rewards += [reward_of(rollout) for rollout in group.rollouts]
            count += 1
    return scale_of(first, second, count), float(np.mean(rewards))


def scale_of(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Return the factor of each coordinate from the gradients of `count` problems, shape (D,).

    Args:
        first: sum of the gradients, shape (D,).
        second: sum of their squares, shape (D,).
    Raises:
        UserError: if all gradients are 0.
    """
    if not second.any():
        raise UserError(
            f"the REINFORCE gradients of {count} problems are 0, because all rewards are equal; choose a policy that "
            "is sometimes right and sometimes wrong"
        )
    variance = (second / count - (first / count) ** 2) * count / (count - 1)
    moment = np.maximum(0, (first / count) ** 2 - variance / count) + variance / MINIBATCH
    root = np.sqrt(moment)
    return 1 / np.maximum(root, FLOOR * float(np.median(root[root > 0])))


def cross(left: np.ndarray, right: np.ndarray) -> float:
    """Return the product of the mean rows of two arrays (BLOCKS, D), without the products within a block."""
    table = left @ right.T
    n = len(table)
    return float((table.sum() - np.trace(table)) / (n * (n - 1)))


def needed(mean: np.ndarray, pooled: np.ndarray, squares: np.ndarray) -> tuple[float, float]:
    """Return (problems to a signal-to-noise ratio of 1, scale) of an arm.

    Args:
        mean: mean gradient of each block of the arm, shape (B, D).
        pooled: the same of all arms together, shape (B, D).
        squares: mean squared length of a problem's gradient in each block, shape (B,).
    """
    signal = cross(pooled, pooled)
    along = cross(mean, pooled) / signal
    return float((squares.mean() - along**2 * signal) / (along**2 * signal)), along


def figures(arms: list[Arm], scale: np.ndarray) -> dict[str, Any]:
    """Return the results of all arms: name -> dictionary."""
    result: dict[str, Any] = {
        arm.name: {
            "settings": arm.overrides,
            "free": arm.free,
            "biased": arm.biased,
            "problems": int(arm.problems.sum()),
            "tokens_per_problem": arm.generated / arm.problems.sum(),
            "trained_per_problem": arm.trained / arm.problems.sum(),
            "seconds_per_problem": arm.seconds / arm.problems.sum(),
            "tokens_times_square": {},
            **{f"{unit}_to_snr_1": {} for unit in UNITS},
            "scale": {},
        }
        for arm in arms
    }
    for row, (space, factor) in enumerate((("raw", np.ones_like(scale)), ("adam", scale))):
        means = [arm.sums / arm.problems[:, None] * factor for arm in arms]
        weights = np.array([0 if arm.biased else arm.problems.sum() ** 2 / arm.squares[row].sum() for arm in arms])
        pooled = sum(w * mean for w, mean in zip(weights / weights.sum(), means, strict=True))
        for arm, mean in zip(arms, means, strict=True):
            squares = arm.squares[row] / arm.problems
            problems, along = needed(mean, pooled, squares)
            kept = [np.delete(np.arange(BLOCKS), block) for block in range(BLOCKS)]
            without = [needed(mean[rows], pooled[rows], squares[rows]) for rows in kept]
            errors = [float(np.std(column)) * (BLOCKS - 1) ** 0.5 for column in zip(*without, strict=True)]
            tokens = result[arm.name]["tokens_per_problem"]
            result[arm.name]["tokens_times_square"][space] = float(squares.mean()) * tokens
            for unit in UNITS:
                amount = result[arm.name][f"{unit}_per_problem"]
                result[arm.name][f"{unit}_to_snr_1"][space] = {"mean": problems * amount, "error": errors[0] * amount}
            result[arm.name]["scale"][space] = {"mean": along, "error": errors[1]}
    return result


def markdown(result: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "# Tokens to measure the gradient",
        "",
        f"`{result['command']}` with torch {result['torch']}; mean reward of the policy {result['reward']:.2f}. Tokens "
        "to a signal-to-noise ratio of 1 (with standard errors), in the space of the parameters and with Adam's scale; "
        "tokens times mean squared length of the gradient, relative to the first arm. The tokens of the MC rollouts of "
        "an arm marked with * are left out. - means that the noise hides the signal: measure more problems.",
        "",
        "| arm | tokens a problem | trained tokens | raw | Adam | trained, raw | seconds, raw | tokens x square, raw | "
        "Adam | scale |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(result["methods"].values()))
    for name, method in result["methods"].items():
        needed = [method["tokens_to_snr_1"][space] for space in ("raw", "adam")]
        trained, seconds = (method[f"{unit}_to_snr_1"]["raw"]["mean"] for unit in ("trained", "seconds"))
        others = f"{trained:,.0f} | {seconds:.2f}" if trained > 0 else "- | -"
        squares = [
            method["tokens_times_square"][space] / first["tokens_times_square"][space] for space in ("raw", "adam")
        ]
        label = name + ("*" if method["free"] else "")
        lines.append(
            f"| {label} | {method['tokens_per_problem']:.0f} | {method['trained_per_problem']:.0f} | "
            + " | ".join(f"{f['mean']:,.0f} ({f['error']:,.0f})" if f["mean"] > 0 else "-" for f in needed)
            + f" | {others} | {squares[0]:.2f} | {squares[1]:.2f} | {method['scale']['raw']['mean']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def parsed(given: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[Arm]]:
    """Parse the command line, and check the settings of every arm before the first one is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--arm", action="append", required=True, metavar="NAME=KEY=VALUE,...")
    parser.add_argument("--free", action="append", default=[], metavar="NAME")
    parser.add_argument(
        "--biased", action="append", default=[], metavar="NAME", help="arm that does not estimate the policy gradient"
    )
    parser.add_argument("--model", help="model of the policy, instead of the recipe's")
    parser.add_argument("--problems", type=int, default=1024, help="number of problems per arm")
    parser.add_argument("--batch", type=int, default=64, help="number of problems that are sampled together")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/gradient"))
    arguments = parser.parse_args(given)
    batch, problems = arguments.batch, arguments.problems
    if batch < BLOCKS or batch % BLOCKS or PILOT % batch or problems < batch or problems % batch:
        parser.error(
            f"--batch is {batch} and --problems is {problems}; --batch must be a multiple of {BLOCKS} that divides "
            f"{PILOT}, and --problems a multiple of --batch"
        )
    try:
        named = [parse_arm(text) for text in arguments.arm]
    except UserError as error:
        parser.error(str(error))
    names = [arm.name for arm in named]
    if len(set(names)) < len(names):
        parser.error(f"--arm: two arms have the same name ({', '.join(names)}); give every arm a name of its own")
    for option in ("free", "biased"):
        unknown = sorted({*getattr(arguments, option)} - {*names})
        if unknown:
            parser.error(f"--{option} {unknown[0]}: no arm has this name; allowed: {', '.join(names)}")
    if {*names} <= {*arguments.biased}:
        parser.error("every arm is --biased; at least one must estimate the policy gradient")
    arms = [
        Arm(
            arm.name,
            {"algorithm": arm.algorithm, **arm.overrides},
            free=arm.name in arguments.free,
            biased=arm.name in arguments.biased,
        )
        for arm in named
    ]
    for arm in arms:
        try:
            config_of(arm, arguments)
        except UserError as error:
            parser.error(f"arm {arm.name}: {error}")
    return arguments, arms


def main() -> None:
    """Measure every arm and write the results."""
    arguments, arms = parsed()
    arguments.out.mkdir(parents=True, exist_ok=True)
    scale, reward = adam_scale(arguments)
    for arm in arms:
        measure(arm, arguments, scale)
        tokens = arm.generated / arm.problems.sum()
        print(f"{arm.name}: {tokens:.0f} tokens a problem, {arm.seconds:.1f} s of sampling and credit", flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/gradient.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "reward": reward,
        "methods": figures(arms, scale),
    }
    (arguments.out / "gradient.json").write_text(json.dumps(result, indent=1))
    (arguments.out / "gradient.md").write_text(markdown(result))
    print("\n" + markdown(result))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"gradient.py: {error}")
