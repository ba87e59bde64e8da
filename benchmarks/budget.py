"""Measure how the error of VinePPO's advantages depends on the number of generated tokens, for several methods.

    python benchmarks/budget.py --out runs/budget

A method is a way to estimate the values of the states of rollouts. `fixed K` samples K new continuations of every
state, as in the VinePPO paper. The other methods turn on `vineppo.reuse` or `vineppo.bisection` or both, and need fewer
tokens. The advantages computed from the estimated values are compared with the advantages computed from the true
values.

A scene is a set of rollouts with the true values of their states. There are two kinds of scenes. In `world`
(tests/world.py), all responses of a tiny policy are enumerated, so the true values are exact; every token is a step. In
the scenes of the embedded models, the true value of a state is approximated by the mean reward of 512 new
continuations, and the variance of this mean is subtracted from the squared errors. Every method estimates the values of
the same rollouts several times, each time with other random numbers.

The script prints a table per scene and writes budget.json and budget.md. The main result is
`tokens_share_at_equal_mse`: the number of tokens with which a method reaches the mean squared error of fixed K = 9,
divided by the number of tokens of fixed K = 9. `tokens_share_at_equal_cosine` is the same for the cosine between
estimated and true advantages. It is reported too, because advantages near zero may also have a small error. Token
counts do not depend on the machine or on its load.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # This makes the folder `tests` importable.

from tests.world import build_world

from vineppo.config.schema import ModelConfig, TaskConfig
from vineppo.credit.advantages import spread_over_tokens, step_advantages
from vineppo.credit.sample import reward_of
from vineppo.credit.vineppo import VinePPOSettings, build_vine_credit
from vineppo.model.policy import Policy
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.steps import build_splitter
from vineppo.tasks import build_task
from vineppo.training.rollouts import draw_problems, sample_groups
from vineppo.types import CreditFn, RolloutGroup, Sampler, Task, TrainingSample
from vineppo.values import MonteCarlo, State

Level = Literal["judgement", "habit"]
REFERENCE_K = 9
"""The K of fixed K to which the other methods are compared."""

METHODS: dict[str, dict[str, Any]] = {
    "fixed K": {},
    "bisection": {"bisection": True},
    "reuse": {"reuse": True},
    "reuse, bisection": {"reuse": True, "bisection": True},
}
"""Name of a method -> settings in the section `vineppo` by which it differs from `fixed K`."""


@dataclass(frozen=True)
class Truth:
    """True advantages of the response tokens of all rollouts of a scene, one after another.

    The advantages contain noise if the true values are approximated by sampling.
    """

    advantages: np.ndarray
    """Token advantages in reward units, shape (tokens,)."""
    variance: np.ndarray
    """Variance of the noise in each entry of `advantages`, shape (tokens,); 0 if the true values are exact."""


@dataclass(frozen=True)
class Scene:
    """Rollouts, and everything that is needed to estimate the values of their states and to know the true values."""

    name: str
    policy: Policy
    task: Task
    sampler: Sampler
    splitter: str
    """Value of the setting `vineppo.splitter`, which determines the states."""
    groups: list[RolloutGroup]
    """The rollouts."""
    max_new_tokens: int
    temperature: float
    value: Callable[[Sequence[State]], tuple[list[float], list[float]]]
    """(states) -> (true value of each state, variance of the noise in each of these values)."""

    def credit(self, method: str, num_mc_rollouts: int, seed: int) -> CreditFn:
        """Return the credit function of VinePPO with one of METHODS, for the rollouts of this scene.

        Args:
            method: a key of METHODS.
            seed: seed of the continuations.
        """
        estimator = MonteCarlo(
            self.sampler,
            self.task,
            self.policy.codec.decode,
            num_mc_rollouts,
            self.max_new_tokens,
            run_seed=seed,
            temperature=self.temperature,
        )
        settings = {"num_mc_rollouts": num_mc_rollouts, "splitter": self.splitter, "reuse": False, **METHODS[method]}
        return build_vine_credit(VinePPOSettings(**settings), estimator, self.policy.codec)


def world_scene(rollouts: int) -> Scene:
    """Build a scene in the enumerable world, with responses of at most six tokens. Every token is a step.

    Args:
        rollouts: number of rollouts.
    """
    world = build_world(6)
    groups = sample_groups(
        [world.problem],
        world.policy.codec,
        world.sampler(),
        world.task,
        group_size=rollouts,
        max_new_tokens=world.max_new_tokens,
        temperature=world.temperature,
        address=(0, "benchmark"),
    )

    def value(states: Sequence[State]) -> tuple[list[float], list[float]]:
        return [world.value(state.response_ids) for state in states], [0.0] * len(states)

    return Scene(
        "world",
        world.policy,
        world.task,
        world.sampler(),
        "tokens:1",
        groups,
        world.max_new_tokens,
        world.temperature,
        value,
    )


def embedded_scene(rollouts: int, level: Level, truth: int) -> Scene:
    """Build a scene with the embedded model of a level: problems of ten steps, one response per problem.

    Args:
        rollouts: number of rollouts, each for a different problem.
        level: level of the task `chain`.
        truth: number of continuations with which the true value of a state is approximated.
    """
    policy = Policy.load(ModelConfig(path=f"embedded:{level}"))
    task = build_task(TaskConfig(level=level, num_steps=10))
    sampler = TorchSampler(policy)
    groups = sample_groups(
        draw_problems(task, 0, 1, rollouts),
        policy.codec,
        sampler,
        task,
        group_size=1,
        max_new_tokens=120,
        temperature=1.0,
        address=(0, "benchmark"),
    )

    def value(states: Sequence[State]) -> tuple[list[float], list[float]]:
        estimator = MonteCarlo(sampler, task, policy.codec.decode, truth, 120, run_seed=-1, temperature=1.0)
        values = [v.mean for v in estimator.evaluate(states, 0)[0] if v is not None]
        # The unbiased estimate of the variance of a mean of `truth` rewards, each 0 or 1.
        return values, [v * (1 - v) / (truth - 1) for v in values]

    return Scene(f"embedded:{level}", policy, task, sampler, "newline", groups, 120, 1.0, value)


def true_advantages(scene: Scene) -> Truth:
    """Return the token advantages computed from the true value of every state."""
    advantages: list[float] = []
    variance: list[float] = []
    cut = build_splitter(scene.splitter)
    for group in scene.groups:
        for rollout in group.rollouts:
            ends = cut(scene.policy.codec.token_texts(rollout.response_ids))
            starts = (0, *ends[:-1])
            states = [State(group.problem, rollout.prompt_ids, rollout.response_ids[:b], rollout) for b in starts]
            values, noise = scene.value(states)
            advantages += spread_over_tokens(step_advantages(values, reward_of(rollout)), ends)
            # An advantage is the difference of two values, so its variance is the sum of their variances.
            steps = [a + b for a, b in zip(noise, [*noise[1:], 0.0], strict=True)]
            variance += spread_over_tokens(steps, ends)
    return Truth(np.array(advantages), np.array(variance))


def estimates(scene: Scene, method: str, num_mc_rollouts: int, repeats: int) -> tuple[np.ndarray, float]:
    """Estimate the token advantages of a scene several times.

    Args:
        method: a key of METHODS.
        repeats: number of estimates, each with other random numbers.
    Returns:
        (token advantages, shape (repeats, tokens); mean number of tokens that were generated for one estimate).
    """
    rows, tokens = [], []
    for repeat in range(repeats):
        samples, metrics = scene.credit(method, num_mc_rollouts, seed=repeat)(scene.groups, 1)
        rows.append(np.concatenate([_response_advantages(sample) for sample in samples]))
        tokens.append(metrics["tokens/mc"])
    return np.stack(rows), float(np.mean(tokens))


def _response_advantages(sample: TrainingSample) -> np.ndarray:
    """Return the advantages of the response tokens of a training sample, without those of the prompt, shape (T,)."""
    return np.array(sample.advantages)[np.array(sample.loss_mask) == 1]


def compared(estimated: np.ndarray, truth: Truth) -> dict[str, float]:
    """Compare estimated token advantages, shape (repeats, tokens), with the true ones.

    The variance of the noise in the true advantages is subtracted from all squared errors.

    Returns:
        `mse`, the mean squared error, and its standard error over the repeats; `mean_error`, the mean of the errors;
        `mean_squared_bias`, the mean over tokens of the squared bias, and `mean_squared_bias_noise`, the standard
        deviation that this mean would have if there were no bias and the tokens were independent; `cosine`, the mean
        cosine between an estimate and the true advantages.
    """
    errors = estimated - truth.advantages
    per_repeat = (errors**2).mean(1) - truth.variance.mean()
    repeats = len(estimated)
    noise = errors.var(0, ddof=1) / repeats
    squared_bias = float((errors.mean(0) ** 2 - noise - truth.variance).mean())
    return {
        "mse": float(per_repeat.mean()),
        "mse_standard_error": float(per_repeat.std(ddof=1) / math.sqrt(repeats)),
        "mean_error": float(errors.mean()),
        "mean_squared_bias": squared_bias,
        "mean_squared_bias_noise": float(noise.mean() * math.sqrt(2 / errors.shape[1])),
        "cosine": float(_cosines(estimated, truth.advantages).mean()),
    }


def _cosines(estimated: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the cosine between each row of estimates and the true advantages.

    Args:
        estimated: shape (repeats, tokens).
        true: shape (tokens,).
    Returns:
        The cosines, shape (repeats,); 0 for a row of zeros.
    """
    lengths = np.linalg.norm(estimated, axis=1) * np.linalg.norm(true)
    return np.asarray(estimated @ true / np.maximum(lengths, np.finfo(float).tiny))


def tokens_at(level: float, measure_name: str, rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the number of tokens with which a method reaches a given error or cosine.

    Between the measured values of K, log(tokens) is interpolated linearly in log(error) or in the cosine.

    Args:
        level: the error or cosine.
        measure_name: `mse` or `cosine`.
        rows: the results of the method, one per K, as in the `rows` of `measure`.
    Returns:
        The number of tokens, or None if `level` is outside the measured range.
    """
    scale = math.log if measure_name == "mse" else float
    points = sorted((scale(row[measure_name]), row["tokens"]) for row in rows)
    if not points[0][0] <= scale(level) <= points[-1][0]:
        return None
    measured, tokens = np.array(points).T
    return float(np.exp(np.interp(scale(level), measured, np.log(tokens))))


def measure(scene: Scene, ks: Sequence[int], repeats: int) -> dict[str, Any]:
    """Measure all methods with all values of K on one scene, and print one line for each.

    Returns:
        The content of budget.json for the scene. `rows` has a dictionary for each method and K.
    """
    truth = true_advantages(scene)
    rows = []
    for method in METHODS:
        for k in ks:
            estimated, tokens = estimates(scene, method, k, repeats)
            rows.append({"method": method, "k": k, "tokens": tokens, **compared(estimated, truth)})
            print(_line(rows[-1]), flush=True)
    return {
        "rollouts": sum(len(group.rollouts) for group in scene.groups),
        "tokens_of_rollouts": len(truth.advantages),
        "mean_square_of_true_advantages": float((truth.advantages**2).mean() - truth.variance.mean()),
        "rows": rows,
        "tokens_share_at_equal_mse": token_shares(rows, "mse"),
        "tokens_share_at_equal_cosine": token_shares(rows, "cosine"),
    }


def token_shares(rows: Sequence[dict[str, Any]], measure_name: str) -> dict[str, float | None]:
    """Return how many tokens each method needs to be as good as fixed K = 9, divided by the tokens of fixed K = 9.

    Args:
        rows: the results of all methods, as in the `rows` of `measure`.
        measure_name: the measure in which the methods are equally good, `mse` or `cosine`.
    Returns:
        Name of each method -> its share, or None if the method does not reach the error or cosine in its measured
        range.
    """
    reference = next(row for row in rows if (row["method"], row["k"]) == ("fixed K", REFERENCE_K))
    shares: dict[str, float | None] = {}
    for method in METHODS:
        tokens = tokens_at(reference[measure_name], measure_name, [row for row in rows if row["method"] == method])
        shares[method] = None if tokens is None else tokens / float(reference["tokens"])
    return shares


def _line(row: dict[str, Any]) -> str:
    """Format the results of one method and K as a line of text."""
    return (
        f"{row['method']:20} K={row['k']:<3} tokens {row['tokens']:>11,.0f}  mse {row['mse']:.5f} "
        f"+- {row['mse_standard_error']:.5f}  squared bias {row['mean_squared_bias']:+.6f} "
        f"(noise {row['mean_squared_bias_noise']:.6f})  cosine {row['cosine']:.3f}"
    )


def markdown(result: dict[str, Any]) -> str:
    """Return the text of budget.md.

    Args:
        result: the content of budget.json.
    """
    lines = [
        "# Error of the advantages over tokens",
        "",
        "Mean squared error of the token advantages, and the cosine of the angle between estimated and true "
        "advantages, by the number of tokens that were generated to evaluate all states of the rollouts once. For "
        "comparison: if every estimate is 0, the mean squared error equals the mean square of the true advantages, and "
        f"the cosine is undefined. Made by `{result['command']}`.",
    ]
    for name, scene in result["scenes"].items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{scene['rollouts']} rollouts of {scene['tokens_of_rollouts']:,} tokens; mean square of the true "
            f"advantages {scene['mean_square_of_true_advantages']:.4f}.",
            "",
            "| method | K | tokens | mean squared error | squared bias | cosine |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['method']} | {r['k']} | {r['tokens']:,.0f} | {r['mse']:.5f} ± {r['mse_standard_error']:.5f} | "
            f"{r['mean_squared_bias']:+.6f} ± {r['mean_squared_bias_noise']:.6f} | {r['cosine']:.3f} |"
            for r in scene["rows"]
        ]
        for measure_name, label in (("mse", "error"), ("cosine", "cosine")):
            shares = [
                f"{method} {'-' if share is None else f'{share:.1%}'}"
                for method, share in scene[f"tokens_share_at_equal_{measure_name}"].items()
                if method != "fixed K"
            ]
            lines += [
                "",
                f"Tokens at the {label} of fixed K = {REFERENCE_K}, as a share of its tokens: {', '.join(shares)}.",
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the arguments, run the measurements and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/budget"))
    parser.add_argument(
        "--ks", default="1,2,3,5,9,16,32", help="values of K to measure with every method; must contain 9"
    )
    parser.add_argument("--rollouts", type=int, default=32, help="number of rollouts in each scene")
    parser.add_argument("--truth", type=int, default=512, help="number of continuations for the true value of a state")
    parser.add_argument("--repeats", type=int, default=12, help="number of repeated evaluations for every method and K")
    parser.add_argument("--scenes", default="world,judgement,habit", help="any of world, judgement, habit")
    arguments = parser.parse_args()
    ks = [int(k) for k in arguments.ks.split(",")]
    if REFERENCE_K not in ks or arguments.repeats < 2 or arguments.truth < 2 or arguments.rollouts < 1:
        parser.error(
            f"--ks must contain {REFERENCE_K}; --repeats and --truth must be at least 2, --rollouts at least 1"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    scenes = {}
    for name in arguments.scenes.split(","):
        if name not in ("world", "judgement", "habit"):
            parser.error(f"--scenes has {name!r}; allowed: world, judgement, habit")
        scene = (
            world_scene(arguments.rollouts)
            if name == "world"
            else embedded_scene(arguments.rollouts, name, arguments.truth)
        )
        print(f"\n{scene.name}")
        scenes[scene.name] = measure(scene, ks, arguments.repeats)
    result = {
        "command": " ".join(["python", "benchmarks/budget.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "platform": platform.platform(),
        **{
            share: {name: scene[share] for name, scene in scenes.items()}
            for share in ("tokens_share_at_equal_mse", "tokens_share_at_equal_cosine")
        },
        "scenes": scenes,
    }
    (arguments.out / "budget.json").write_text(json.dumps(result, indent=1))
    (arguments.out / "budget.md").write_text(markdown(result))
    for name, measured in scenes.items():
        print(f"{name}: tokens_share_at_equal_mse {measured['tokens_share_at_equal_mse']}")


if __name__ == "__main__":
    main()
