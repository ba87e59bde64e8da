"""Tokens per second of the sampler and of `generate`, and a profile of both."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from dev.gpu.part import GIB, Cells, Part
from dev.gpu.policies import LLAMA_11B, QWEN_05B, Dtype, random_policy, random_prompts, trained_policy
from dev.gpu.results import without_folders

from vineppo.model.codec import Codec
from vineppo.model.policy import Policy
from vineppo.sampling.torch.pace import Pace
from vineppo.sampling.torch.sampler import TorchSampler, kv_bytes_per_token
from vineppo.types import SampleRequest

Engine = Callable[[int], Any]
"""A function that samples a number of tokens in every row."""
KV_GIB = 16
"""Memory for the sampler's keys and values in `speed`; enough for one batch of 2,048 rows."""
CALLS = {
    "graph launches": ("cudaGraphLaunch", "cuGraphLaunch"),
    "kernel launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "synchronizations": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "copies": ("cudaMemcpyAsync", "cudaMemcpy"),
}
"""Names of the profiler's events that are counted per token step."""


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
        sampler = endless_sampler(build())
        part.facts[f"{name}: tree attention"] = sampler.tree_attention
        for rows in sizes:
            part.check(3)
            add_speeds(part, {"model": name, "rows": rows}, engines_of(part, sampler, rows), sampler, limit)
        del sampler
        part.clear()
    _profile(part, engines_of(part, endless_sampler(next(iter(models.values()))()), sizes[1]))


def endless_sampler(policy: Policy, pace: Pace | None = None) -> TorchSampler:
    """Return a sampler of the policy that knows no end-of-sequence token."""
    return TorchSampler(Policy(policy.model, Codec(policy.codec.tokenizer, ())), kv_memory=KV_GIB * GIB, pace=pace)


def _prompt_length(part: Part) -> int:
    return 8 if part.small else 128


def engines_of(part: Part, sampler: TorchSampler, rows: int) -> dict[str, Engine]:
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


def add_speeds(part: Part, head: Cells, engines: Mapping[str, Engine], sampler: TorchSampler, seconds: float) -> None:
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
        (part.out / "profile.txt").write_text(without_folders("\n".join(text)), encoding="utf-8")


def _events(part: Part, run: Engine, tokens: int) -> tuple[Any, float]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if part.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        seconds = part.timed(lambda: run(tokens))[1]
    return profile.key_averages(), seconds


def _calls(events: Any, names: Sequence[str]) -> int:
    return sum(event.count for event in events if event.key in names)
