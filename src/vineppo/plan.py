"""`vineppo plan`: what a run will take, before it starts: tokens, seconds by phase, memory.

Where the model can be loaded here, a small piece of the first iteration is really done (*calibration*), and its counts
and times are scaled up: sampling by the cost of one more row, updates by the cost of one more token. For an accelerator
that is not here (`--gpu`) the times follow from its arithmetic and memory rate, and are rough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vineppo.config import Config
from vineppo.learner import Learner
from vineppo.policy import Policy, resolve_model_path
from vineppo.rollouts import draw_problems, generated_tokens
from vineppo.steps import build_splitter, step_ends
from vineppo.train import build_parts, sample_rollouts, total_updates, updates_per_iteration
from vineppo.types import Metrics, RolloutGroup, Sampler, SampleRequest, UserError

GIB = float(1 << 30)


@dataclass(frozen=True)
class Shape:
    """The size of a language model."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


KNOWN = {
    "microsoft/rho-math-1b-v0.1": Shape(1_100_048_384, 22, 2048, 5632, 32, 4, 64, 32_000),
    "realtreetune/rho-1b-sft-GSM8K": Shape(1_100_048_384, 22, 2048, 5632, 32, 4, 64, 32_000),
    "realtreetune/rho-1b-sft-MATH": Shape(1_100_048_384, 22, 2048, 5632, 32, 4, 64, 32_000),
    "deepseek-ai/deepseek-math-7b-base": Shape(6_910_365_696, 30, 4096, 11_008, 32, 32, 128, 102_400),
    "realtreetune/deepseekmath-7b-sft-GSM8K": Shape(6_910_365_696, 30, 4096, 11_008, 32, 32, 128, 102_400),
    "realtreetune/deepseekmath-7b-sft-MATH-v2": Shape(6_910_365_696, 30, 4096, 11_008, 32, 32, 128, 102_400),
}
"""The paper's models, for plans on machines that cannot reach the hub (from their published configurations)."""


@dataclass(frozen=True)
class Gpu:
    """What an accelerator's data sheet says."""

    flops: float
    """Dense 16-bit products per second."""
    bandwidth: float
    """Bytes per second."""
    memory: float
    """Bytes."""


GPUS = {
    "t4": Gpu(65e12, 0.32e12, 16 * GIB),
    "l4": Gpu(121e12, 0.30e12, 24 * GIB),
    "a10": Gpu(125e12, 0.60e12, 24 * GIB),
    "rtx4090": Gpu(165e12, 1.01e12, 24 * GIB),
    "a100": Gpu(312e12, 2.04e12, 80 * GIB),
    "h100": Gpu(989e12, 3.35e12, 80 * GIB),
    "h200": Gpu(989e12, 4.80e12, 141 * GIB),
}
_CALIBRATED_ROLLOUTS = 8
"""At least so many responses are sampled in a calibration: fewer foretell little of lengths and continuations."""
_REUSE_SHARE = 0.3
"""Of the tokens of K fresh continuations that `vineppo.reuse` needs, as measured on the embedded task."""
_TRAINING, _DECODING = 0.12, 0.06
"""Shares of a data sheet's arithmetic that training and decoding reach: what the VinePPO paper's seconds per iteration
imply (dev/LOG.md)."""


@dataclass(frozen=True)
class Amounts:
    """What one iteration does."""

    rollouts: int
    rollout_tokens: float
    prompt_tokens: float
    """Of one prompt."""
    mc_tokens: float
    steps_per_response: float
    updates: int

    @property
    def sequence_tokens(self) -> float:
        """Mean length of a prompt with its response."""
        return self.prompt_tokens + self.rollout_tokens / self.rollouts


@dataclass(frozen=True)
class Plan:
    """What a run will take."""

    source: str
    """How the figures were found."""
    amounts: Amounts
    seconds: Mapping[str, float]
    """Of one iteration, by phase: sample, credit, update."""
    iterations: int
    memory: Mapping[str, float]
    """Bytes by kind, and `peak`."""
    available: float
    """Bytes; 0 where unknown."""
    variants: Sequence[tuple[str, float, float]]
    """(what else one could do, tokens of continuations, seconds) of one iteration."""

    @property
    def seconds_per_iteration(self) -> float:
        """All phases."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "seconds_per_iteration": self.seconds_per_iteration}


def plan(
    config: Config, *, gpu: str | None = None, response_tokens: int | None = None, problems: int | None = None
) -> Plan:
    """Predict what a run of this configuration will take.

    Args:
        gpu: an accelerator of GPUS; None plans for this machine, by a calibration.
        response_tokens: mean response length, for a GPU; None: a third of the budget.
        problems: how many the calibration answers; None: two, or more where their groups are small.
    Raises:
        UserError: for an unknown GPU, a model whose size cannot be found out, or a run that does not fit into the
            memory, with the nearest setting that does.
    """
    made = _planned_for(config, gpu, response_tokens) if gpu else _calibrated_safely(config, problems)
    if made.available and made.memory["peak"] > made.available:
        raise UserError(_does_not_fit(config, made.amounts, made.memory, made.available))
    return made


# --- by calibration ---------------------------------------------------------------------------------------------------


def _calibrated_safely(config: Config, problems: int | None) -> Plan:
    """A calibration, which takes the memory of a run, only where at least what every run needs is there."""
    shape, available = _shape_by_name(config), _available(config.model.device)
    amounts = _guessed_amounts(config, None)
    memory = _memory(config, shape, amounts, trainable=_trainable(config, shape))
    kinds = ("runtime", "weights", "optimizer", "gradients", "reference", "critic")
    if 0 < available < sum(memory[kind] for kind in kinds):
        raise UserError(_does_not_fit(config, amounts, memory, available))
    try:
        return _calibrated(config, problems)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(_does_not_fit(config, amounts, memory, available)) from error


def _calibrated(config: Config, problems: int | None) -> Plan:
    own = config.rollouts
    few = min(problems or max(2, -(-_CALIBRATED_ROLLOUTS // own.group_size)), own.num_problems)
    quiet = replace(config.learner, lr=0.0, epochs=1, minibatch_size=few * own.group_size, weight_decay=0.0)
    parts = build_parts(replace(config, rollouts=replace(own, num_problems=few), learner=quiet))
    policy, learner = parts.policy, parts.learner
    drawn = draw_problems(parts.task, config.run.seed, 1, few)
    groups, sample_seconds = _timed(lambda: sample_rollouts(parts, drawn, 1))
    (samples, metrics), credit_seconds = _timed(lambda: parts.credit(groups, 1))
    step = _step_seconds(learner)
    _, update_seconds = _timed(lambda: learner.update(samples, 1, 0))
    prepare = _seconds(lambda: learner.logprobs(policy, samples)) * (2 if learner.reference else 1)
    scale = own.num_problems / few
    amounts = _amounts(config, groups, metrics, scale)
    per_row = _seconds_per_row(parts.sampler, groups)
    tokens = generated_tokens(groups)
    extra = (scale - 1) * per_row
    passes = max(0.0, update_seconds - prepare - step)
    seconds = {
        "sample": sample_seconds + extra * tokens,
        "credit": credit_seconds + extra * metrics.get("tokens/mc", 0.0)
        if config.algorithm == "vineppo"
        else credit_seconds * scale,
        "update": scale * (prepare + config.learner.epochs * passes) + amounts.updates * step,
    }
    memory = _memory(config, _shape_of(policy.model), amounts, trainable=_count(policy.model, trainable=True))
    what = f"calibrated on {few} of {own.num_problems} problems: {tokens:,} tokens and their credit"
    return Plan(
        what, amounts, seconds, _iterations(config, amounts, seconds), memory, _available(config.model.device),
        _variants(config, policy, groups, amounts, seconds),
    )  # fmt: skip


def _step_seconds(learner: Learner) -> float:
    """One step of the optimizers, at rate 0, which changes nothing; the first one takes memory and is not timed."""
    seconds = 0.0
    for optimizer in filter(None, (learner.optimizer, learner.critic_optimizer)):
        for timed in (False, True):
            for parameter in optimizer.parameters:
                parameter.grad = torch.zeros_like(parameter)
            seconds += timed * _seconds(lambda optimizer=optimizer: optimizer.step(0.0, 1.0))
    return seconds


def _seconds_per_row(sampler: Sampler, groups: Sequence[RolloutGroup]) -> float:
    """What one more token costs in a position that is decoded anyway: the slope between few rows and many."""
    prompts = [group.rollouts[0].prompt_ids for group in groups]
    few, many, positions = 16, 96, 12
    times = []
    for rows in (few, many):
        requests = [SampleRequest(ids, rows // len(prompts), positions, seed=i) for i, ids in enumerate(prompts)]
        sampler.sample(requests)
        found, seconds = _timed(lambda requests=requests: sampler.sample(requests))
        times.append((sum(len(c.token_ids) for group in found for c in group), seconds))
    (n, a), (m, b) = times
    return max(0.0, (b - a) / max(1, m - n))


def _amounts(config: Config, groups: Sequence[RolloutGroup], metrics: Metrics, scale: float) -> Amounts:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = config.rollouts.num_problems * config.rollouts.group_size
    return Amounts(
        rollouts=count,
        rollout_tokens=generated_tokens(groups) * scale,
        prompt_tokens=sum(len(r.prompt_ids) for r in rollouts) / len(rollouts),
        mc_tokens=metrics.get("tokens/mc", 0.0) * scale,
        steps_per_response=metrics.get("credit/steps_per_response", 1.0),
        updates=updates_per_iteration(config),
    )


def _variants(
    config: Config, policy: Policy, groups: Sequence[RolloutGroup], amounts: Amounts, seconds: Mapping[str, float]
) -> list[tuple[str, float, float]]:
    """What other K, splitters and groups would do, in proportion to the tokens that they need."""
    if config.algorithm != "vineppo":
        return []
    own, total = config.vineppo, sum(seconds.values())

    def with_share(name: str, share: float) -> tuple[str, float, float]:
        return name, amounts.mc_tokens * share, total + (share - 1) * seconds["credit"]

    ks = [k for k in (1, 3, 9, 18) if k != own.num_mc_rollouts]
    rows = [with_share(f"vineppo.num_mc_rollouts {k}", k / own.num_mc_rollouts) for k in ks]
    base = _remaining_tokens(config.vineppo.splitter, config, policy, groups)
    for spec in ("newline", "math", "cutpoints", "tokens:16", "tokens:64"):
        if spec != own.splitter and base and not own.reuse and not own.bisection:
            rows.append(with_share(f"vineppo.splitter {spec}", _remaining_tokens(spec, config, policy, groups) / base))
    if not own.min_mc_rollouts and own.num_mc_rollouts > 1 and not own.reuse:
        least = math.ceil(0.4 * own.num_mc_rollouts)
        rows.append(with_share(f"vineppo.min_mc_rollouts {least} (at best)", least / own.num_mc_rollouts))
    twice = amounts.mc_tokens * 2, total * 2
    rows.append((f"rollouts.group_size {2 * config.rollouts.group_size} (at most)", *twice))
    return rows


def _remaining_tokens(spec: str, config: Config, policy: Policy, groups: Sequence[RolloutGroup]) -> int:
    """Tokens behind all states of the rollouts: what one continuation of each would take if it were as long."""
    cut, total = build_splitter(spec), 0
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        starts = (0, *step_ends(rollout, cut, policy.token_texts, config.vineppo.max_states)[:-1])
        total += sum(len(rollout.response_ids) - start for start in starts)
    return total


def _timed(work: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    done = work()
    return done, time.perf_counter() - began


def _seconds(work: Any) -> float:
    return _timed(work)[1]


# --- from a data sheet ------------------------------------------------------------------------------------------------


def _planned_for(config: Config, name: str, response_tokens: int | None) -> Plan:
    gpu, shape = _gpu(name), _shape_by_name(config)
    amounts = _guessed_amounts(config, response_tokens)
    length, mc_tokens, rows = (
        int(amounts.rollout_tokens / amounts.rollouts),
        amounts.mc_tokens,
        config.rollouts.max_rows,
    )
    trained = amounts.rollouts * amounts.sequence_tokens
    per_token = 2 * shape.parameters / (_TRAINING * gpu.flops)
    networks = 2 if config.algorithm == "ppo" else 1
    forward = trained * per_token * (1 + (config.learner.kl.coefficient > 0))
    seconds = {
        "sample": _decoding(shape, gpu, amounts.rollout_tokens, length, rows),
        "credit": _decoding(shape, gpu, mc_tokens, length, rows) if mc_tokens else (networks - 1) * trained * per_token,
        "update": forward + 3 * trained * per_token * config.learner.epochs * networks,
    }
    memory = _memory(config, shape, amounts, trainable=_trainable(config, shape))
    what = f"from the data sheet of {name}, rough; {length} tokens to a response"
    return Plan(what, amounts, seconds, _iterations(config, amounts, seconds), memory, gpu.memory, ())


def _guessed_amounts(config: Config, response_tokens: int | None) -> Amounts:
    """Without a calibration: responses of a third of the budget, unless told otherwise, in steps of 30 tokens."""
    own = config.rollouts
    length = response_tokens or max(1, own.max_new_tokens // 3)
    rollouts = own.num_problems * own.group_size
    steps = min(max(1, length // 30), config.vineppo.max_states or length)
    mc_tokens = 0.0
    if config.algorithm == "vineppo":
        # K continuations of S states, half a response long each; with reuse those of a state serve the next ones too.
        share = _REUSE_SHARE if config.vineppo.reuse else 1.0
        mc_tokens = rollouts * config.vineppo.num_mc_rollouts * steps * length / 2 * share
    return Amounts(rollouts, rollouts * length, 120.0, mc_tokens, steps, updates_per_iteration(config))


def _gpu(name: str) -> Gpu:
    """`h100`, or `8xh100`: eight of them, over which everything is shared without loss."""
    count, _, kind = name.partition("x") if name.split("x")[0].isdigit() else ("1", "", name)
    if kind not in GPUS or int(count) < 1:
        raise UserError(f"--gpu {name} is not known; allowed: {', '.join(GPUS)}, or several such as 8xh100")
    one, n = GPUS[kind], int(count)
    return Gpu(one.flops * n, one.bandwidth * n, one.memory * n)


def _decoding(shape: Shape, gpu: Gpu, tokens: float, length: int, rows: int) -> float:
    """Seconds for tokens in waves of so many rows: arithmetic, or reading weights and keys, whichever is more."""
    waves = max(1.0, tokens / (rows * length))
    reading = waves * length * 2 * shape.parameters + tokens * length / 2 * _kv_bytes(shape, 2)
    return max(2 * shape.parameters * tokens / (_DECODING * gpu.flops), reading / gpu.bandwidth)


def _shape_by_name(config: Config) -> Shape:
    path = resolve_model_path(config.model.path)
    if path in KNOWN:
        return KNOWN[path]
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
        with torch.device("meta"):
            return _shape_of(AutoModelForCausalLM.from_config(found))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.path {path!r}: its configuration cannot be read ({reason})") from error


def _shape_of(model: Any) -> Shape:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return Shape(
        parameters=_count(model),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
    )


def _count(model: Any, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def _trainable(config: Config, shape: Shape) -> int:
    """Weights that are trained; adapters on all linear layers of the usual seven."""
    r = config.model.lora.r
    if not r:
        return shape.parameters
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = 2 * (shape.hidden + queries) + 2 * (shape.hidden + keys) + 3 * (shape.hidden + shape.intermediate)
    return r * sides * shape.layers


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(config: Config, shape: Shape, amounts: Amounts, trainable: int) -> dict[str, float]:
    """Bytes by kind. Sampling and updating do not happen at the same time: the peak is the larger of the two."""
    size = 2 if config.model.dtype == "bfloat16" else 4
    lora, ppo = config.model.lora.r > 0, config.algorithm == "ppo"
    weights = shape.parameters * size
    trained_size = 4 if lora else size
    # AdamW's two moments, a float32 master of 16-bit weights, and gradients (twice where there is a master).
    optimizer = trainable * (8 + (4 if trained_size == 2 else 0))
    gradients = trainable * (trained_size + (4 if trained_size == 2 else 0))
    reference = weights if config.learner.kl.coefficient > 0 and not lora else 0
    critic = (trainable * trained_size if lora else weights) + optimizer + gradients if ppo else 0.0
    length = amounts.sequence_tokens
    rows = min(config.rollouts.max_rows, max(amounts.rollouts, amounts.mc_tokens / max(1.0, length / 2)))
    kv = min(config.rollouts.kv_memory * GIB, rows * length * _kv_bytes(shape, size))
    logits = min(rows, 1 << 12) * shape.vocabulary * size
    packed = weights if config.model.device == "cpu" and (size == 2 or lora) else 0
    tokens = _micro_batch(config, amounts)
    activations = _activations(config, shape, size, tokens, amounts.rollout_tokens / amounts.rollouts / length)
    runtime = 0.6 * GIB  # the interpreter, PyTorch and transformers
    held = runtime + weights + optimizer + reference + critic
    return {
        "runtime": runtime,
        "weights": weights,
        "optimizer": optimizer,
        "gradients": gradients,
        "reference": reference,
        "critic": critic,
        "keys and values": kv,
        "sampling": logits + packed,
        "activations": activations,
        "peak": held + max(kv + logits + packed, gradients + activations),
    }


def _micro_batch(config: Config, amounts: Amounts) -> float:
    """Tokens of the largest forward and backward pass."""
    return min(config.learner.micro_batch_tokens, amounts.rollouts * amounts.sequence_tokens)


def _activations(config: Config, shape: Shape, size: int, tokens: float, trained_share: float) -> float:
    """Kept between the forward and the backward pass of a micro-batch: per layer, and the logits of trained tokens."""
    layer = (10 * shape.hidden + 4 * shape.intermediate + 4 * shape.heads * shape.head_dim) * size
    if config.model.gradient_checkpointing:
        layers = shape.hidden * size * shape.layers + layer
    else:
        layers = layer * shape.layers
    # The logits, in float32, their logarithm, and the gradients of both.
    return tokens * layers + tokens * trained_share * shape.vocabulary * (size + 16)


def _kv_bytes(shape: Shape, size: int) -> float:
    return 2.0 * shape.layers * shape.kv_heads * shape.head_dim * size


def _available(device: str) -> float:
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[1])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        total = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemTotal"))
    except (OSError, StopIteration):
        return 0.0
    try:  # a container may have less than its machine
        return min(total, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit: the file holds `max`
        return total


def _does_not_fit(config: Config, amounts: Amounts, memory: Mapping[str, float], available: float) -> str:
    """One line with the nearest setting that fits, tried in the order of what it costs."""
    peak = memory["peak"]
    needs = f"the run needs about {peak / GIB:.1f} GiB and there are {available / GIB:.1f}"
    held = peak - max(memory["keys and values"] + memory["sampling"], memory["gradients"] + memory["activations"])
    room = available - held
    if memory["gradients"] + memory["activations"] > room > memory["gradients"]:
        tokens = _micro_batch(config, amounts)
        fitting = tokens * (room - memory["gradients"]) / memory["activations"]
        if fitting >= amounts.sequence_tokens:
            return f"{needs}; it fits with learner.micro_batch_tokens {int(fitting)} (the result is the same)"
        return f"{needs}; try model.gradient_checkpointing true, or model.lora.r 16"
    if memory["keys and values"] + memory["sampling"] > room > memory["sampling"]:
        fitting = (room - memory["sampling"]) / GIB
        return f"{needs}; it fits with rollouts.kv_memory {fitting:.1f} (the result is the same)"
    smaller = "model.dtype bfloat16" if config.model.dtype == "float32" else "a smaller model or a larger machine"
    return f"{needs}; try {'' if config.model.lora.r else 'model.lora.r 16, or '}{smaller}"


def _iterations(config: Config, amounts: Amounts, seconds: Mapping[str, float]) -> int:
    """Until the first limit."""
    limits = [config.run.iterations, -(-total_updates(config) // amounts.updates)]
    if config.run.max_tokens:
        limits.append(math.ceil(config.run.max_tokens / (amounts.rollout_tokens + amounts.mc_tokens)))
    if config.run.max_seconds:
        limits.append(math.ceil(config.run.max_seconds / sum(seconds.values())))
    return min(limits)


def report(made: Plan, config: Config) -> list[str]:
    """The lines that `vineppo plan` prints."""
    amounts, n = made.amounts, made.iterations
    run = made.seconds_per_iteration * n
    lines = [
        f"{config.algorithm} on {config.model.path}: {amounts.rollouts} rollouts per iteration, {n:,} iterations, "
        f"{n * amounts.updates:,} updates",
        f"  ({made.source})",
        f"  tokens per iteration  {amounts.rollout_tokens:,.0f} rollouts, {amounts.mc_tokens:,.0f} MC rollouts "
        f"({amounts.steps_per_response:.1f} steps to a response)",
        f"  tokens of the run     {n * (amounts.rollout_tokens + amounts.mc_tokens):,.0f}",
        "  seconds per iteration "
        + ", ".join(f"{phase} {value:.1f}" for phase, value in made.seconds.items())
        + f": {made.seconds_per_iteration:.1f}",
        f"  time of the run       {_hours(run)} (evaluation not counted)",
    ]
    kinds = [f"{kind} {value / GIB:.2f}" for kind, value in made.memory.items() if value and kind != "peak"]
    lines += [
        f"  memory in GiB         {', '.join(kinds)}",
        f"  peak                  {made.memory['peak'] / GIB:.2f} GiB of {made.available / GIB:.1f}",
    ]
    if made.variants:
        lines.append("  what else it could be (MC tokens and seconds per iteration):")
        lines += [f"    {name:<42} {tokens:>12,.0f} {seconds:>8.1f} s" for name, tokens, seconds in made.variants]
    return lines


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
