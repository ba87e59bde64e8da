"""Find out what the package does on a CUDA GPU, with one command of a few minutes.

    PYTHONPATH=src python dev/gpu_check.py --out docs/results/gpu

Parts, in this order; `--parts a,b` selects some of them:

- `device`: name, memory and versions; speed of matrix products.
- `equal`: the sampler's log-probabilities against the trainer's; two calls and two devices with the same seeds.
- `pace`: the sampler with and without CUDA graphs, fused attention, and a check at every token: the same results, and
  tokens per second.
- `speed`: tokens per second of the sampler and of `generate`, and a profile of both.
- `trainings`: three iterations on the GPU and on the CPU, side by side.
- `update`: memory and seconds of an update, and the memory that `vineppo plan` predicts.
- `resume`: a killed and resumed run against an unbroken run.
- `learning`: the default training, for as many iterations as fit into the time.

Each part has a share of `--seconds`; time that a part leaves goes to the next ones. A part that fails or runs out of
time does not stop the others. The results so far are written after every measurement: OUT/gpu.json, the tables in
OUT/gpu.md, and OUT/profile.txt. With `--device cpu --small` the program only tests itself. `--model DIR` adds a model
with trained weights to `equal` and `speed`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import vineppo
from vineppo.config.load import config_to_dict
from vineppo.config.schema import Config, LearnerConfig, ModelConfig, TaskConfig
from vineppo.credit import find_algorithm
from vineppo.credit.sample import training_sample
from vineppo.learning.learner import TorchLearner
from vineppo.model.codec import Codec
from vineppo.model.modes import with_checkpointing
from vineppo.model.policy import Policy
from vineppo.model.tiny import build_tokenizer
from vineppo.plan.amounts import Amounts
from vineppo.plan.memory import available_memory, memory_by_kind
from vineppo.plan.shape import count, shape_of
from vineppo.run.clock import peak_memory
from vineppo.run.environment import version_of
from vineppo.sampling.torch import attention
from vineppo.sampling.torch.pace import Pace, pace_of
from vineppo.sampling.torch.sampler import TorchSampler, kv_bytes_per_token
from vineppo.tasks import build_task
from vineppo.training.loop import resume
from vineppo.training.parts import build_learner
from vineppo.training.rollouts import problem_range
from vineppo.types import Completion, Rollout, SampleRequest

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
Engine = Callable[[int], Any]
"""A function that samples a number of tokens in every row."""
KV_GIB = 16
"""Memory for the sampler's keys and values in `speed`; enough for one batch of 2,048 rows."""
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Dtype = Literal["float32", "bfloat16"]
BOTH: tuple[Dtype, ...] = ("float32", "bfloat16")
Cells = dict[str, Any]

SHARES = {
    "device": 0.03,
    "equal": 0.12,
    "pace": 0.18,
    "speed": 0.27,
    "trainings": 0.08,
    "update": 0.07,
    "resume": 0.12,
    "learning": 0.13,
}
"""Share of the total time of each part, in the order in which the parts run."""

QWEN_05B: Cells = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
LLAMA_11B: Cells = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
}
SHARP: Cells = {"num_hidden_layers": 4, "vocab_size": 151_936, "initializer_range": 0.15}
"""Changes for `equal`: few layers, and weights that are large enough for next-token distributions far from uniform."""
TINY: Cells = {
    "hidden_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 700,
}
"""Changes with `--small`."""

EMBEDDED = "embedded:judgement"
COMPARED = (
    "reward/mean",
    "policy/loss",
    "policy/grad_norm",
    "kl/ref",
    "policy/kl_old",
    "policy/entropy",
    "policy/sampler_logprob_gap",
    "response/length_mean",
    "tokens/generated",
)
"""Metrics that `trainings` shows side by side."""
CALLS = {
    "graph launches": ("cudaGraphLaunch", "cuGraphLaunch"),
    "kernel launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "synchronizations": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "copies": ("cudaMemcpyAsync", "cudaMemcpy"),
}
"""Names of the profiler's events that are counted per token step."""


class OutOfTime(Exception):
    """The time of a part is over."""


@dataclass
class Part:
    """The settings and the time of one part of the check, and the results that it has recorded so far."""

    device: str
    small: bool
    model: str
    """Directory of a model with trained weights, or an empty text."""
    out: Path
    deadline: float
    """Value of `time.perf_counter()` at which the part should end."""
    save: Callable[[], None]
    facts: Cells = field(default_factory=dict)
    tables: dict[str, list[Cells]] = field(default_factory=dict)

    def left(self) -> float:
        """Return the seconds until the part should end."""
        return self.deadline - time.perf_counter()

    def check(self, seconds: float = 0.0) -> None:
        """Raise OutOfTime if less than `seconds` are left."""
        if self.left() < seconds:
            raise OutOfTime

    def row(self, table: str, cells: Mapping[str, Any]) -> None:
        """Add a row to a table, and write all results."""
        self.tables.setdefault(table, []).append(dict(cells))
        self.save()

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.startswith("cuda")

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Return the result of a function and its seconds, including the work that it left on the GPU."""
        self.wait()
        began = time.perf_counter()
        result = work()
        self.wait()
        return result, time.perf_counter() - began

    def wait(self) -> None:
        """Wait until the GPU has finished all work."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Free the memory that is no longer used, and reset the peak."""
        gc.collect()
        if self.cuda and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        """Return the peak memory in GiB: of the GPU since the last `clear`, or on a CPU of the process."""
        return round(peak_memory(torch.device(self.device)) / GIB, 3)


def random_policy(part: Part, shape: Mapping[str, Any], dtype: Dtype) -> Policy:
    """Build a policy with random weights that never samples an end-of-sequence token."""
    options = {**shape, **(TINY if part.small else {})}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 2048}
    config = AutoConfig.for_model(**{**options, **ends})
    torch.manual_seed(0)
    with torch.device(part.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return Policy(model, Codec(build_tokenizer(), ()))


def trained_policy(path: str, part: Part, dtype: Dtype) -> Policy:
    """Load a model with trained weights."""
    return Policy.load(ModelConfig(path=path, dtype=dtype, device=part.device))


def chain_prompts(policy: Policy, number: int) -> list[tuple[int, ...]]:
    """Return prompts of the chain task, which the embedded models have learned."""
    task = build_task(TaskConfig())
    return [policy.codec.prompt_ids(problem) for problem in problem_range(task, "train", number)]


def random_prompts(policy: Policy, number: int, length: int) -> list[tuple[int, ...]]:
    """Return prompts of random tokens."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    return [tuple(row) for row in np.random.default_rng(0).integers(3, vocabulary, (number, length)).tolist()]


# device


def check_device(part: Part) -> None:
    """Record the name, the memory and the versions of the device, and the speed of its matrix products."""
    part.facts |= {
        "device": torch.cuda.get_device_name(part.device) if part.cuda else platform.machine(),
        "memory in GiB": round(available_memory(part.device) / GIB, 1),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "bfloat16": torch.cuda.is_bf16_supported() if part.cuda else None,
        "matrix products in float32": torch.get_float32_matmul_precision(),
        **{name: version_of(name) for name in ("transformers", "peft", "numpy", "pyarrow")},
        "vineppo": vineppo.__version__,
    }
    size = 256 if part.small else 4096
    for name, dtype in DTYPES.items():
        part.check()
        part.row("matrix products", {"dtype": name, "size": size, "TFLOP/s": _tflops(part, size, dtype)})


def _driver() -> str | None:
    """Return the version of the GPU's driver, or None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout.strip() or None


def _tflops(part: Part, size: int, dtype: torch.dtype) -> float:
    """Return the speed of the product of two square matrices in 10^12 operations per second."""
    left = torch.randn(size, size, device=part.device, dtype=dtype)

    def multiply(times: int) -> None:
        for _ in range(times):
            left @ left

    multiply(3)
    times = 3 if part.small else 20
    return round(2 * size**3 * times / part.timed(lambda: multiply(times))[1] / 1e12, 3)


# equal


def check_equal(part: Part) -> None:
    """Compare the sampler with the trainer, with itself, and with the sampler on the CPU."""
    models: dict[str, Callable[[Dtype], Policy]] = {
        EMBEDDED: lambda dtype: trained_policy(EMBEDDED, part, dtype),
        "random Qwen2, 4 layers": lambda dtype: random_policy(part, {**QWEN_05B, **SHARP}, dtype),
        "random Llama, 4 layers": lambda dtype: random_policy(part, {**LLAMA_11B, **SHARP, "hidden_size": 1024}, dtype),
    }
    if part.model:
        models[Path(part.model).name] = lambda dtype: trained_policy(part.model, part, dtype)
    for dtype in reversed(BOTH):
        for name, build in models.items():
            part.check(3)
            policy = build(dtype)
            prompts = chain_prompts(policy, 8) if name == EMBEDDED else random_prompts(policy, 2, 20)
            _compare_samples(part, {"model": name, "dtype": dtype}, policy, prompts)
            del policy
            part.clear()


def _compare_samples(part: Part, head: Cells, policy: Policy, prompts: Sequence[tuple[int, ...]]) -> None:
    """Sample the prompts' responses and continuations of their states twice; add a row for each temperature.

    The CPU samples the same in float32 after all measurements of the GPU, because the model moves to it.
    """
    found = {}
    for temperature in (1.0, 0.6):
        sampler = TorchSampler(policy)
        requests = _vines(part, sampler, prompts, temperature)
        first, second = sampler.sample(requests), sampler.sample(requests)
        gaps = _gaps(policy, requests, first, temperature)
        found[temperature] = requests, first
        cells = {
            **head,
            "temperature": temperature,
            "completions": sum(map(len, first)),
            "tokens": len(gaps),
            "largest difference": float(gaps.max()),
            "mean difference": float(gaps.mean()),
            "mean log-probability": float(np.mean([x for group in first for c in group for x in c.logprobs])),
            "twice the same": first == second,
            "tree attention": sampler.tree_attention,
        }
        part.row("sampler and trainer, log-probabilities in nats", cells)
    if head["dtype"] == "float32":
        policy.model.to("cpu")
        for temperature, (requests, completions) in found.items():
            part.check(2)
            row = {**head, "temperature": temperature, **_agreement(completions, TorchSampler(policy).sample(requests))}
            part.row("the same seeds on the GPU and on the CPU", row)


def _vines(
    part: Part, sampler: TorchSampler, prompts: Sequence[tuple[int, ...]], temperature: float
) -> list[SampleRequest]:
    """Return requests for two responses to each prompt, and for three continuations of each of their states."""
    length, every = (12, 4) if part.small else (24, 8)
    first = [SampleRequest(ids, 2, length, seed=i, temperature=temperature) for i, ids in enumerate(prompts)]
    requests = list(first)
    for request, completions in zip(first, sampler.sample(first), strict=True):
        for completion in completions:
            for start in range(every, len(completion.token_ids), every):
                prefix = request.prompt_ids + completion.token_ids[:start]
                seed = 1000 + len(requests)
                requests.append(SampleRequest(prefix, 3, length - start, seed, start, temperature=temperature))
    return requests


def _gaps(
    policy: Policy, requests: Sequence[SampleRequest], results: list[list[Completion]], temperature: float
) -> np.ndarray:
    """Return the differences between the log-probabilities of the sampler and of the trainer, one per token."""
    learner = TorchLearner(policy, None, None, LearnerConfig(), None, temperature=temperature, total_updates=1, seed=0)
    pairs = [(r, c) for r, completions in zip(requests, results, strict=True) for c in completions]
    samples = [
        training_sample(
            Rollout(r.prompt_ids, c.token_ids, c.logprobs, c.finish_reason, "", 0.0), [1.0] * len(c.token_ids)
        )
        for r, c in pairs
    ]
    rows = learner.logprobs(policy, samples).logprobs
    return np.abs(np.concatenate([np.subtract(row, c.logprobs) for row, (_, c) in zip(rows, pairs, strict=True)]))


def _agreement(one: list[list[Completion]], other: list[list[Completion]]) -> Cells:
    """Return the share of equal completions, and the largest difference of the log-probabilities of these."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True)]
    equal = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
    gaps = [float(np.abs(np.subtract(a.logprobs, b.logprobs)).max()) for a, b in equal]
    return {
        "completions": len(pairs),
        "share equal": len(equal) / len(pairs),
        "largest difference if equal": max(gaps, default=0.0),
    }


# pace


@dataclass(frozen=True)
class Variant:
    """A way in which the sampler decodes."""

    pace: Pace
    fused: bool = True

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Leave fused attention out if the variant does."""
        chosen = attention.fused_on_cuda
        if not self.fused:
            attention.fused_on_cuda = lambda *_: False  # type: ignore[assignment]
        try:
            yield
        finally:
            attention.fused_on_cuda = chosen


def _variants(part: Part) -> dict[str, Variant]:
    """Return the ways to compare by name. The first one uses CUDA graphs (`sampler.graph`) and fused attention."""
    usual = pace_of(torch.device(part.device), graph=True)
    if not part.cuda:  # for a test of this program: everything but the capture
        usual = Pace(8, 8, 0.5, fixed=True)
    every = dataclasses.replace(usual, check_every=1)
    without = dataclasses.replace(usual, graph=False)
    return {
        "everything": Variant(usual),
        "no graphs": Variant(without),
        "no graphs, no fixed tensors": Variant(dataclasses.replace(without, fixed=False)),
        "no fused attention": Variant(usual, fused=False),
        "a check at every token": Variant(every),
        "none of these": Variant(dataclasses.replace(every, graph=False, fixed=False), fused=False),
    }


def check_pace(part: Part) -> None:
    """Compare the results and the speed of the sampler's ways to decode."""
    for dtype in BOTH:
        models: dict[str, Callable[[], Policy]] = {
            EMBEDDED: functools.partial(trained_policy, EMBEDDED, part, dtype),
            "random Qwen2, 4 layers": functools.partial(random_policy, part, {**QWEN_05B, **SHARP}, dtype),
        }
        for name, build in models.items():
            part.check(3)
            _compare_variants(part, {"model": name, "dtype": dtype}, build())
            part.clear()
    dtype = "float32" if part.small else "bfloat16"
    part.facts |= {"dtype of the speeds": dtype, "rows per prompt": 8 if not part.small else 2}
    if part.cuda:
        found = {name: attention.fused_on_cuda(torch.device(part.device), DTYPES[name], 64) for name in BOTH}
        part.facts["fused attention agrees with matrix products"] = found
    policy = random_policy(part, QWEN_05B, dtype)
    sizes = (4,) if part.small else (64, 2048, 512)
    limit = min(4.0, part.left() / (2.5 * len(_variants(part)) * len(sizes)))
    for rows in sizes:
        engines = {}
        for name, variant in _variants(part).items():
            part.check(2)
            sampler = _endless_sampler(policy, variant.pace)
            engines[name] = _with_variant(variant, _engines(part, sampler, rows)["sampler"])
        _speed_cells(part, {"model": "0.5B (Qwen2.5)", "rows": rows}, engines, _endless_sampler(policy), limit)


def _with_variant(variant: Variant, engine: Engine) -> Engine:
    def run(tokens: int) -> None:
        with variant.used():
            engine(tokens)

    return run


def _compare_variants(part: Part, head: Cells, policy: Policy) -> None:
    """Sample the same requests in every way; add a row for each that compares it with the first."""
    prompts = chain_prompts(policy, 8) if head["model"] == EMBEDDED else random_prompts(policy, 4, 20)
    length = 12 if part.small else 40
    requests = [SampleRequest(ids, 4 + i, length + i, seed=i, temperature=0.8) for i, ids in enumerate(prompts)]
    expected: list[list[Completion]] = []
    for name, variant in _variants(part).items():
        part.check(1)
        sampler = TorchSampler(policy, pace=variant.pace)
        with variant.used(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = sampler.sample(requests)
        expected = expected or found
        cells = {
            **head,
            "variant": name,
            **_agreement(expected, found),
            "same bits": found == expected,
            "graphs": sampler.steps.captures,
            "warning": "; ".join(str(w.message) for w in caught),
        }
        part.row("compared with everything on", cells)


# speed


def check_speed(part: Part) -> None:
    """Measure the sampler and `generate` at three batch sizes and with two models, and profile both."""
    dtype: Dtype = "float32" if part.small else "bfloat16"
    models: dict[str, Callable[[], Policy]] = {
        "0.5B (Qwen2.5)": lambda: random_policy(part, QWEN_05B, dtype),
        "1.1B (TinyLlama)": lambda: random_policy(part, LLAMA_11B, dtype),
    }
    if part.model:
        models[Path(part.model).name] = lambda: trained_policy(part.model, part, dtype)
    sizes = (4, 16) if part.small else (64, 512, 2048)
    limit = min(8.0, part.left() / (4 * len(models) * len(sizes)))
    part.facts |= {"dtype": dtype, "prompt tokens": _prompt_length(part), "rows per prompt": 8 if not part.small else 2}
    part.facts |= {"limit of keys and values in GiB": KV_GIB, "seconds per measurement at most": round(limit, 1)}
    for name, build in models.items():
        sampler = _endless_sampler(build())
        part.facts[f"{name}: tree attention"] = sampler.tree_attention
        for rows in sizes:
            part.check(3)
            _speed_cells(part, {"model": name, "rows": rows}, _engines(part, sampler, rows), sampler, limit)
        del sampler
        part.clear()
    _profile(part, _engines(part, _endless_sampler(next(iter(models.values()))()), sizes[1]))


def _endless_sampler(policy: Policy, pace: Pace | None = None) -> TorchSampler:
    """Return a sampler of the policy that knows no end-of-sequence token."""
    return TorchSampler(Policy(policy.model, Codec(policy.codec.tokenizer, ())), kv_memory=KV_GIB * GIB, pace=pace)


def _prompt_length(part: Part) -> int:
    return 8 if part.small else 128


def _engines(part: Part, sampler: TorchSampler, rows: int) -> dict[str, Engine]:
    """Return the functions that sample `rows` rows, eight for each prompt."""
    policy: Any = sampler.policy
    group = 2 if part.small else 8
    prompts = random_prompts(policy, rows // group, _prompt_length(part))
    ids = torch.tensor(prompts, device=part.device).repeat_interleave(group, 0)  # (rows, prompt tokens)

    def sample(tokens: int) -> None:
        sampler.sample([SampleRequest(prompt, group, tokens, seed=i) for i, prompt in enumerate(prompts)])

    def generate(tokens: int) -> None:
        options: Cells = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}
        with torch.no_grad():
            out = policy.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                **options,
            )
        assert out.shape[1] == ids.shape[1] + tokens

    return {"sampler": sample, "generate": generate}


def _speed_cells(part: Part, head: Cells, engines: Mapping[str, Engine], sampler: TorchSampler, seconds: float) -> None:
    """Add a row for each engine. All engines sample equal numbers of tokens, so that the slowest needs `seconds`."""
    # The short run has a captured graph already.
    few, most = (2, 4) if part.small else (10, 128)
    short: dict[str, float] = {}
    for name, run in engines.items():
        part.clear()
        with _out_of_memory(part, {**head, "engine": name}):
            run(2)
            short[name] = part.timed(functools.partial(run, few))[1]
    tokens = max(few + 2, min(most, int(seconds * few / max(short.values(), default=1.0))))
    for name in short:
        part.check(1)
        part.clear()
        before = torch.cuda.memory_allocated(part.device) if part.cuda else 0
        with _out_of_memory(part, {**head, "engine": name}):
            taken = part.timed(functools.partial(engines[name], tokens))[1]
            generated, prompts = head["rows"] * tokens, head["rows"] // part.facts["rows per prompt"]
            kept = generated + (prompts if name != "generate" else head["rows"]) * _prompt_length(part)
            cells = {
                **head,
                "engine": name,
                "new tokens": tokens,
                "seconds": round(taken, 3),
                "tokens/s": round(generated / taken),
                "ms per token step": round(1000 * (taken - short[name]) / (tokens - few), 2),
                "keys and values in GiB": round(kept * kv_bytes_per_token(sampler.policy.model) / GIB, 3),
                "peak in GiB": part.peak(),
                "before in GiB": round(before / GIB, 3),
            }
            part.row("tokens per second", cells)


@contextlib.contextmanager
def _out_of_memory(part: Part, head: Cells) -> Iterator[None]:
    """Add a row instead of an exception if the memory of the GPU is too small."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        part.row("tokens per second", {**head, "new tokens": "out of memory"})


def _profile(part: Part, engines: Mapping[str, Engine]) -> None:
    """Profile a few token steps of each engine: tables of the longest operations, and calls of CUDA per token step."""
    text = []
    # More tokens than it takes to capture a graph, and then those of one check.
    few, more = 9, 17
    for name, run in engines.items():
        part.check(3)
        fewer, _ = _events(part, run, few)
        events, seconds = _events(part, run, more)
        # The difference between the two runs has no prefill.
        per_step = {
            label: (_calls(events, names) - _calls(fewer, names)) / (more - few) for label, names in CALLS.items()
        }
        operators = sum(e.count for e in events if e.key.startswith("aten::"))
        busy = sum(e.self_device_time_total for e in events if str(e.device_type).endswith("CUDA")) / 1e6
        cells = {"engine": name, **per_step, "operators in all": operators, "share of time on the GPU": busy / seconds}
        part.row("calls per token step", cells)
        for order in ("self_device_time_total", "self_cpu_time_total")[not part.cuda :]:
            table = events.table(sort_by=order, row_limit=15, max_name_column_width=70)
            text += [f"{name}, {more} token steps, by {order}", table, ""]
        (part.out / "profile.txt").write_text(_clean("\n".join(text)), encoding="utf-8")


def _events(part: Part, run: Engine, tokens: int) -> tuple[Any, float]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if part.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        seconds = part.timed(lambda: run(tokens))[1]
    return profile.key_averages(), seconds


def _calls(events: Any, names: Sequence[str]) -> int:
    return sum(event.count for event in events if event.key in names)


# trainings


def check_trainings(part: Part) -> None:
    """Train three iterations on the GPU and on the CPU with VinePPO and GRPO."""
    for algorithm in ("vineppo", "grpo"):
        part.check(5)
        with tempfile.TemporaryDirectory() as folder:
            runs = {"GPU": Path(folder) / "gpu", "CPU": Path(folder) / "cpu"}
            for name, run in runs.items():
                vineppo.train(_short_training(part, algorithm, run, part.device if name == "GPU" else "cpu"))
                part.clear()
            lines = {name: _read_lines(run)[1:] for name, run in runs.items()}
            responses = {
                name: pq.read_table(run / "rollouts" / "000001.parquet")["response"].to_pylist()
                for name, run in runs.items()
            }
        equal = [a == b for a, b in zip(responses["GPU"], responses["CPU"], strict=True)]
        part.facts[f"{algorithm}: share of equal responses in iteration 1"] = sum(equal) / len(equal)
        _add_iterations(part, algorithm, lines)


def _short_training(part: Part, algorithm: str, run: Path, device: str) -> Config:
    problems, group = (16, 1) if algorithm == "vineppo" else (4, 4)
    overrides: Cells = {
        "model.device": device,
        "rollouts.num_problems": problems // 4 if part.small else problems,
        "rollouts.group_size": group,
        "learner.minibatch_size": 4,
        "learner.warmup_updates": 0,
        "eval.every": 0,
        "eval.final_num_problems": 0,
        "run.iterations": 2 if part.small else 3,
        "run.checkpoint_every": 0,
        "run.dir": str(run),
    }
    if part.small:
        overrides |= {"task.num_steps": 3, "rollouts.max_new_tokens": 40}
    return vineppo.build_config(vineppo.load_recipe("judgement"), algorithm, overrides)


def _add_iterations(part: Part, algorithm: str, lines: Mapping[str, list[Cells]]) -> None:
    for gpu, cpu in zip(lines["GPU"], lines["CPU"], strict=True):
        iteration = {"algorithm": algorithm, "iteration": gpu["iteration"]}
        for metric in (name for name in COMPARED if name in gpu):
            cells = {"metric": metric, "GPU": gpu[metric], "CPU": cpu[metric], "difference": gpu[metric] - cpu[metric]}
            name = "iteration 1" if gpu["iteration"] == 1 else "later iterations, after different samples"
            part.row(name, {**iteration, **cells})
        seconds = {
            f"{phase}, {name}": round(line[f"seconds/{phase}"], 3)
            for phase in ("sample", "credit", "update")
            for name, line in (("GPU", gpu), ("CPU", cpu))
        }
        part.row("seconds", {**iteration, **seconds})


def _read_lines(run: Path) -> list[Cells]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# update


def check_update(part: Part) -> None:
    """Measure memory and seconds of updates of the 0.5B model, and compare the memory with the prediction."""
    for dtype in reversed(BOTH):
        for checkpointing in (False, True):
            part.check(4)
            part.clear()
            cells: Cells = {"dtype": dtype, "gradient checkpointing": checkpointing}
            try:
                part.row("updates", cells | _measured_update(part, dtype, checkpointing))
            except torch.cuda.OutOfMemoryError:
                part.row("updates", cells | {"sequences": "out of memory"})


def _measured_update(part: Part, dtype: Dtype, checkpointing: bool) -> Cells:
    sequences, prompt, length = (4, 8, 32) if part.small else (16, 128, 512)
    overrides: Cells = {
        "model.dtype": dtype,
        "model.device": part.device,
        "model.gradient_checkpointing": checkpointing,
        "rollouts.num_problems": 1,
        "rollouts.group_size": sequences,
        "learner.minibatch_size": sequences,
        "learner.epochs": 1,
    }
    config = vineppo.build_config(vineppo.load_recipe("judgement"), "grpo", overrides)
    policy = random_policy(part, QWEN_05B, dtype)
    if checkpointing:
        policy = Policy(with_checkpointing(policy.model), policy.codec)
    learner = build_learner(config, find_algorithm("grpo"), policy)
    samples = [
        training_sample(
            Rollout(ids[:prompt], ids[prompt:], (0.0,) * (length - prompt), "length", "", i % 2),
            [1.0 - 2 * (i % 2)] * (length - prompt),
        )
        for i, ids in enumerate(random_prompts(policy, sequences, length))
    ]
    first = part.timed(lambda: learner.update(samples, 1, sequences))[1]
    after = torch.cuda.memory_allocated(part.device) if part.cuda else 0
    metrics, second = part.timed(lambda: learner.update(samples, 2, sequences))
    measured = peak_memory(policy.device)
    amounts = Amounts(sequences, sequences * (length - prompt), prompt, 0.0, 1.0, 1)
    kinds = memory_by_kind(config, shape_of(policy.model), amounts, count(policy.model, trainable=True))
    # On a GPU only the learner's part of the prediction can be compared: nothing is sampled here, and the interpreter
    # uses main memory.
    predicted = sum(kinds[kind] for kind in ("weights", "optimizer", "reference", "gradients", "activations"))
    return {
        "sequences": sequences,
        "tokens": length,
        "seconds, first": round(first, 3),
        "seconds, second": round(second, 3),
        "grad_norm": metrics["policy/grad_norm"],
        "predicted bytes": round(predicted),
        "measured bytes": measured,
        "measured / predicted": round(measured / predicted, 3),
        "kept between updates": after,
        "predicted weights and optimizer": round(kinds["weights"] + kinds["optimizer"]),
        "predicted activations": round(kinds["activations"]),
        "predicted peak of the run": round(kinds["peak"]),
    }


# resume


def check_resume(part: Part) -> None:
    """Kill a run after its first checkpoint and resume it; compare it, and a second unbroken run, with a first one."""
    with tempfile.TemporaryDirectory() as folder:
        whole, again, cut = (Path(folder) / name for name in ("whole", "again", "cut"))
        process = _start(_interrupted_run(part, cut))
        try:
            while not (cut / "checkpoints" / "000001").exists() and process.poll() is None:
                time.sleep(0.01)
                part.check()
            time.sleep(0.1)
        finally:
            process.kill()  # SIGKILL
        output = process.communicate()[0]
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the run ended before it was killed: {output[-600:]}")
        part.facts["iterations of the killed run"] = _read_lines(cut)[-1]["iteration"]
        part.facts["its checkpoint"] = max(path.name for path in (cut / "checkpoints").iterdir() if path.name.isdigit())
        vineppo.train(_interrupted_run(part, whole))
        resume(_interrupted_run(part, cut))
        part.row("against an unbroken run", {"run": "killed and resumed", **_difference(whole, cut)})
        part.check(2)
        vineppo.train(_interrupted_run(part, again))
        part.row("against an unbroken run", {"run": "unbroken again", **_difference(whole, again)})


def _interrupted_run(part: Part, run: Path) -> Config:
    overrides: Cells = {
        "model.device": part.device,
        "rollouts.num_problems": 4 if part.small else 16,
        "learner.minibatch_size": 4,
        "eval.every": 0,
        "eval.final_num_problems": 0,
        "run.iterations": 4,
        "run.checkpoint_every": 1,
        "run.dir": str(run),
    }
    if part.small:
        overrides |= {"task.num_steps": 3, "rollouts.max_new_tokens": 40}
    return vineppo.build_config(vineppo.load_recipe("judgement"), None, overrides)


def _start(config: Config) -> subprocess.Popen[str]:
    """Start a training in another process."""
    path = Path(config.run.dir).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    source, threads = Path(str(vineppo.__file__)).resolve().parents[1], torch.get_num_threads()
    python_path = os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "vineppo", "train", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def _difference(whole: Path, other: Path) -> Cells:
    """Return whether two runs have the same metrics and weights, and the first metric that differs."""
    first, largest, lines = "", 0.0, _read_lines(whole)
    for one, two in zip(lines, _read_lines(other), strict=True):
        for key in (key for key in one if not key.startswith("seconds/")):
            if one[key] != two.get(key):
                first = first or f"iteration {one['iteration']}, {key}: {one[key]} and {two.get(key)}"
                largest = max(largest, abs(one[key] - two.get(key, 0.0)) / max(abs(one[key]), 1e-12))
    hashes = [hashlib.sha256((run / "final/model.safetensors").read_bytes()).hexdigest() for run in (whole, other)]
    return {
        "iterations": lines[-1]["iteration"],
        "same metrics": not first,
        "same weights": hashes[0] == hashes[1],
        "first difference": first,
        "largest relative difference": largest,
    }


# learning


class InTime:
    """A reporter that records the accuracies, and ends the run in time for the last evaluation."""

    def __init__(self, part: Part):
        self.part = part
        self.began = self.evaluation = 0.0

    def start(self, sampler: str) -> None:
        """Note the time at which the first evaluation starts."""
        self.began = time.perf_counter()

    def phase(self, name: str) -> None:
        """Do nothing."""

    def before_iteration(self, iteration: int) -> None:
        """Do nothing."""

    def saved(self, iteration: int) -> None:
        """Do nothing."""

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Record the accuracy, if the iteration has one."""
        if metrics["iteration"] == 0:
            self.evaluation = time.perf_counter() - self.began
        if "eval/accuracy" in metrics:
            keys = {"iteration": "iteration", "eval/accuracy": "accuracy", "seconds/train": "seconds of training"}
            self.part.row("validation", {label: metrics[key] for key, label in keys.items()})

    def wants_to_stop(self) -> bool:
        """Return whether the time left is only enough for the last evaluation."""
        return self.part.left() < 1.2 * self.evaluation + 2

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """Record the summary of the run."""
        seconds, iterations = summary["seconds"], summary["iterations"]
        self.part.facts |= {
            "accuracy before": summary["accuracy_before"],
            "accuracy after": summary["accuracy_after"],
            "iterations": iterations,
            "updates": summary["updates"],
            "finish_reason": summary["finish_reason"],
            "seconds of training": round(seconds, 2),
            "seconds of evaluation": round(summary["seconds_eval"], 2),
            "seconds per iteration": round(seconds / max(1, iterations), 3),
            "generated tokens": summary["tokens"]["generated"],
            "peak in GiB": round(summary["peak_memory_bytes"] / GIB, 3),
        }


def check_learning(part: Part) -> None:
    """Train the default recipe for as many iterations as fit into the time, at most 60."""
    overrides: Cells = {"model.device": part.device, "run.checkpoint_every": 0}
    if part.small:
        overrides |= {"run.iterations": 3, "rollouts.num_problems": 8, "learner.minibatch_size": 8, "eval.every": 2}
        overrides |= {"eval.num_problems": 8, "eval.final_num_problems": 16, "task.num_steps": 3}
    part.check(10 if not part.small else 1)
    with tempfile.TemporaryDirectory() as folder:
        overrides["run.dir"] = str(Path(folder) / "run")
        config = vineppo.build_config(vineppo.load_recipe("judgement"), None, overrides)
        vineppo.train(config, recipe="judgement", reporter=InTime(part))


# the program

CHECKS: dict[str, Callable[[Part], None]] = {
    "device": check_device,
    "equal": check_equal,
    "pace": check_pace,
    "speed": check_speed,
    "trainings": check_trainings,
    "update": check_update,
    "resume": check_resume,
    "learning": check_learning,
}


class Results:
    """The results of all parts, and the files that they are written to."""

    def __init__(self, out: Path, head: Cells):
        self.out, self.head = out, head
        self.parts: dict[str, Cells] = {}
        self.began = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        """Write gpu.json and gpu.md."""
        found = {**self.head, "seconds": round(time.perf_counter() - self.began, 1), "parts": self.parts}
        for name, text in (("gpu.json", json.dumps(found, indent=1, default=str) + "\n"), ("gpu.md", markdown(found))):
            temporary = self.out / f".{name}"
            temporary.write_text(_clean(text), encoding="utf-8")
            temporary.replace(self.out / name)


def _clean(text: str) -> str:
    """Remove the folders of this machine from a text."""
    text = text.replace(f"{ROOT}{os.sep}", "")
    text = re.sub(r"[^\s\"'(]*/(?:site|dist)-packages/", "", text)
    return text.replace(str(Path.home()), "~")


def run_part(name: str, part: Part, entry: Cells) -> None:
    """Run a part and record how it ended."""
    began = time.perf_counter()
    try:
        part.check(1)
        CHECKS[name](part)
        entry["status"] = "done"
    except OutOfTime:
        entry["status"] = "cut short" if part.tables or part.facts else "skipped"
        entry["reason"] = "the time of the part was over"
    except Exception as error:  # the other parts still run
        entry["status"] = "failed"
        entry["reason"] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        entry["traceback"] = traceback.format_exc().splitlines()[-14:]
    entry["seconds"] = round(time.perf_counter() - began, 1)
    with contextlib.suppress(RuntimeError):  # after an error of CUDA every call fails
        part.clear()
    part.save()
    reason = f": {_clean(entry['reason'])}" if "reason" in entry else ""
    print(f"{name:<10} {entry['status']:<9} {entry['seconds']:6.1f} s{reason}", flush=True)


def markdown(found: Mapping[str, Any]) -> str:
    """Return the text of gpu.md."""
    lines = ["# The package on a GPU", "", f"`{found['command']}`, {found['seconds']:.0f} seconds."]
    for name, part in found["parts"].items():
        state = part["status"] + (f": {part['reason']}" if "reason" in part else "")
        lines += ["", f"## {name}", "", f"{state}, {part.get('seconds', 0):.0f} seconds."]
        lines += [""] if part["facts"] else []
        lines += [f"- {key}: {_text(value)}" for key, value in part["facts"].items()]
        for title, rows in part["tables"].items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += ["", f"**{title}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(_text(row.get(key, '')) for key in columns)} |" for row in rows]
        if "traceback" in part:
            lines += ["", "```", *part["traceback"], "```"]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value).replace("|", "/").replace("\n", " ")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts; return 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.md and profile.txt")
    parser.add_argument("--device", default="cuda", help="PyTorch device")
    parser.add_argument("--parts", default=",".join(SHARES), help="names, separated by commas")
    parser.add_argument("--seconds", type=float, default=420.0, help="time of all parts together")
    parser.add_argument("--model", default="", help="directory of a model with trained weights")
    parser.add_argument("--small", action="store_true", help="tiny models and runs, for a test on a CPU")
    given = parser.parse_args(argv)
    names = [name for name in SHARES if name in given.parts.split(",")]
    if unknown := set(given.parts.split(",")) - set(SHARES):
        parser.error(f"--parts has {', '.join(sorted(unknown))}; allowed: {', '.join(SHARES)}")
    command = f"python dev/gpu_check.py --device {given.device} --parts {','.join(names)} --seconds {given.seconds:g}"
    results = Results(given.out, {"command": command + " --small" * given.small, "device": given.device})
    total, used = sum(SHARES[name] for name in names), 0.0
    for name in names:
        used += SHARES[name]
        part = Part(
            device=given.device,
            small=given.small,
            model=given.model,
            out=given.out,
            deadline=results.began + given.seconds * used / total,
            save=results.save,
        )
        entry: Cells = {"status": "running", "facts": part.facts, "tables": part.tables}
        results.parts[name] = entry
        run_part(name, part, entry)
    return int(any(entry["status"] == "failed" for entry in results.parts.values()))


if __name__ == "__main__":
    sys.exit(main())
