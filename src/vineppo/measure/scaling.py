"""Measure the cost of credit over the length of a chain on this machine, for `vineppo scaling`.

The cost is the seconds per response: of the continuations that value its states, and of a value network that predicts
the values of its states once and is trained on it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from vineppo.config.measure import ScalingSpec
from vineppo.measure.costmodel import CostModel, break_even, fit_cost
from vineppo.measure.gpus import ASSUMPTIONS, gpu_rows
from vineppo.measure.longchain import Scene, build_policy, build_scene, fixed_tokens
from vineppo.measure.session import Say
from vineppo.model.critic import ValueNetwork
from vineppo.sampling.build import sampler_line

METHODS = ("fixed_k", "reuse", "bisection")
"""Ways to value states by continuations: new ones of every state, reused ones, and only of states around decisive
steps."""
CRITIC = "value network"
EPOCHS = 2
"""Epochs in which the value network is trained on a response."""
MINIBATCH = 64
"""Responses per optimizer step; a response bears this share of the step."""
_ENOUGH = 10.0
"""Seconds after which a row is not timed again."""


def measure_scaling(spec: ScalingSpec, say: Say) -> dict[str, Any]:
    """Measure the cost of continuations and of a value network, fit cost models, and apply them to larger models.

    Returns:
        The content of scaling.json; docs/measuring.md explains the keys.
    Raises:
        UserError: if a GPU is unknown.
    """
    began = time.perf_counter()
    gpu_rows(spec.gpus, spec.k, {})  # reports an unknown GPU before the measurement
    policy = build_policy(max(spec.steps) * spec.step_tokens, spec.width)
    rows = []
    for steps in sorted(set(spec.steps)):
        for method in METHODS:
            row = _timed_method(spec, policy, steps, method)
            if row is None:
                say(f"{method}, {steps} steps: left out, more than 4 times --max_tokens")
                continue
            say(f"{method}, {steps} steps: {row['tokens']:,.0f} tokens and {row['seconds']:.3f} s per response")
            rows.append(row)
        rows.append(_timed_critic(spec, policy, steps))
        say(f"{CRITIC}, {steps} steps: {rows[-1]['seconds']:.4f} s per response")
    models = {method: _model_of(rows, method, spec.held_out) for method in (*METHODS, CRITIC)}
    fits = {method: fit for method, fit in models.items() if fit is not None}
    critic = CostModel(tuple(fits[CRITIC]["coefficients"]))
    shares = {method: share_of_tokens(rows, method, spec.k, spec.step_tokens) for method in METHODS if method in fits}
    return {
        "kind": "scaling",
        "k": spec.k,
        "step_tokens": spec.step_tokens,
        "held_out": spec.held_out,
        "clock": spec.clock,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "sampler": sampler_line(policy, "auto"),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "rows": rows,
        "models": fits,
        "break_even": {
            method: break_even(CostModel(tuple(fit["coefficients"])).seconds, critic.seconds, max(spec.steps))
            for method, fit in fits.items()
            if method != CRITIC
        },
        "gpus": gpu_rows(spec.gpus, spec.k, shares),
        "assumptions": list(ASSUMPTIONS),
        "tokens": int(sum(row["tokens"] * row["responses"] * row["runs"] for row in rows)),
        "seconds": time.perf_counter() - began,
    }


def _timed_method(spec: ScalingSpec, policy: Any, steps: int, method: str) -> dict[str, Any] | None:
    """Time the credit of one method at one length, or return None if one response needs too many tokens."""
    needed = fixed_tokens(steps, spec.step_tokens, spec.k)
    # Reuse and bisection need fewer tokens; a third is a cautious guess.
    each = needed if method == "fixed_k" else needed / 3
    if method != "bisection" and each > 4 * spec.max_tokens:
        return None
    responses = max(1, min(spec.responses, int(spec.max_tokens / each)))
    scene = build_scene(policy, steps, (responses, 1, spec.k), spec.step_tokens)
    credit, tokens = scene.credit(method), 0.0

    def run() -> None:
        nonlocal tokens
        tokens = credit(scene.groups, 0)[1]["tokens/mc"]

    seconds, runs = _median_seconds(run, spec)
    return {
        "method": method,
        "steps": steps,
        "responses": responses,
        "runs": runs,
        "tokens": tokens / responses,
        "seconds": seconds / responses,
    }


def _timed_critic(spec: ScalingSpec, policy: Any, steps: int) -> dict[str, Any]:
    """Time the value network at one length: a prediction, two epochs, and a share of an optimizer step."""
    scene = build_scene(policy, steps, (spec.responses, 1, 1), spec.step_tokens)
    network = ValueNetwork(policy, seed=spec.seed)
    ids, mask, targets = _batch(scene)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)

    def predict() -> None:
        with torch.no_grad():
            network(ids, mask)

    def train() -> None:
        network.zero_grad()
        ((network(ids, mask) - targets) ** 2).sum().backward()

    predicted, _ = _median_seconds(predict, spec)
    trained, runs = _median_seconds(train, spec)
    stepped, _ = _median_seconds(lambda: optimizer.step() and None, spec)
    return {
        "method": CRITIC,
        "steps": steps,
        "responses": spec.responses,
        "runs": runs,
        "tokens": 0.0,
        "seconds": (predicted + EPOCHS * trained) / spec.responses + EPOCHS * stepped / MINIBATCH,
    }


def _batch(scene: Scene) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids (B, T), the mask of the response tokens (B, T), and a target per response token (N,)."""
    rollouts = [group.rollouts[0] for group in scene.groups]
    ids = torch.tensor([r.prompt_ids + r.response_ids for r in rollouts])
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, len(rollouts[0].prompt_ids) :] = True
    targets = torch.tensor([r.reward or 0.0 for r in rollouts for _ in r.response_ids])
    return ids, mask, targets


def _median_seconds(work: Callable[[], None], spec: ScalingSpec) -> tuple[float, int]:
    """Call a function several times, after one call that is not counted if it is short, and return (median, runs)."""
    clock = time.process_time if spec.clock == "cpu" else time.perf_counter
    times: list[float] = []

    def timed() -> float:
        start = clock()
        work()
        return clock() - start

    first = timed()
    if first > _ENOUGH / 2:
        return first, 1
    while len(times) < spec.repeats and sum(times) < _ENOUGH:
        times.append(timed())
    return max(1e-9, median(times)), len(times)


def _model_of(rows: Sequence[Mapping[str, Any]], method: str, held_out: int) -> dict[str, Any] | None:
    """Fit the cost model of a method without the held-out length, and compare its prediction there.

    Returns:
        coefficients, the fitted lengths, and `held_out`: steps, measured and predicted seconds; None with fewer than
        three lengths.
    """
    own = [row for row in rows if row["method"] == method]
    fitted = [row for row in own if row["steps"] != held_out]
    if len(fitted) < 3:
        return None
    model = fit_cost([row["steps"] for row in fitted], [row["seconds"] for row in fitted])
    result: dict[str, Any] = {"coefficients": model.coefficients, "fitted": [row["steps"] for row in fitted]}
    for row in own:
        if row["steps"] == held_out:
            predicted = model.seconds(held_out)
            result["held_out"] = {
                "steps": held_out,
                "measured": row["seconds"],
                "predicted": predicted,
                "error": predicted / row["seconds"] - 1,
            }
    return result


def share_of_tokens(
    rows: Sequence[Mapping[str, Any]], method: str, k: int, step_tokens: int
) -> Callable[[float], float]:
    """Return the continuation tokens of a method relative to K new continuations of every state, over the steps.

    Between measured lengths, the logarithm of the share is interpolated over the logarithm of the steps; outside, the
    share is that of the nearest measured length.

    Args:
        rows: measurements with method, steps and tokens per response; at least one of the method.
        method: one of METHODS.
        k: K, the number of continuations per state.
        step_tokens: tokens per step.
    """
    own = [row for row in rows if row["method"] == method]
    x = np.log([row["steps"] for row in own])
    y = np.log([max(1e-6, row["tokens"] / fixed_tokens(row["steps"], step_tokens, k)) for row in own])
    return lambda steps: float(np.exp(np.interp(np.log(steps), x, y)))
