"""Run one sampling engine in a separate process, for benchmarks/vines.py; benchmarks/length.py imports from it.

    python benchmarks/engines.py ENGINE WORK.json

Loads the model and prints `ready`. For every line on standard input it then samples the whole workload once and prints
one line of JSON: seconds, number of tokens, and the peak memory of the process so far. Only the selected engine is
imported, so each engine can be installed in its own environment.

The workload is a JSON file: `model`, a directory; `dtype`; `threads`; `prefixes`, lists of token ids; `lengths`, one
list per prefix with the number of tokens of each of its continuations. End-of-sequence tokens are ignored and every
continuation has exactly its length, so all engines do the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

Work = dict[str, Any]
Run = Callable[[], int]
"""Samples the whole workload once and returns the number of generated tokens."""

GENERATE_ROWS = 64
"""Number of sequences in a static batch of `generate`."""


def native(work: Work) -> Run:
    """The sampler of this package."""
    from vineppo.config.schema import ModelConfig
    from vineppo.model.policy import Policy
    from vineppo.sampling.torch.sampler import TorchSampler
    from vineppo.types import SampleRequest

    policy = Policy.load(ModelConfig(path=work["model"], dtype=work["dtype"]))
    policy.codec = replace(policy.codec, eos_ids=())
    sampler = TorchSampler(policy)
    requests = [
        SampleRequest(tuple(prefix), 1, length, seed=1000 * i + j)
        for i, (prefix, lengths) in enumerate(zip(work["prefixes"], work["lengths"], strict=True))
        for j, length in enumerate(lengths)
    ]
    return lambda: sum(len(c.token_ids) for group in sampler.sample(requests) for c in group)


def transformers_model(work: Work) -> Any:
    """The model as users of `generate` load it: with fused attention, without gradients."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
    model.eval().requires_grad_(False)
    return model


def generate(work: Work) -> Run:
    """transformers' `generate` in static batches of GENERATE_ROWS rows, padded on the left, sorted by prefix length.

    A row is finished when it has its length, as if it had sampled the end of the sequence. A batch runs until all its
    rows are finished.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    model = transformers_model(work)
    pairs = zip(work["prefixes"], work["lengths"], strict=True)
    rows = sorted(((prefix, length) for prefix, lengths in pairs for length in lengths), key=lambda row: -len(row[0]))

    class LengthReached(StoppingCriteria):
        """Stops each row at its own length."""

        def __init__(self, prompt: int, lengths: list[int]):
            self.ends = torch.tensor(lengths) + prompt

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends

    def batch(chosen: list[tuple[list[int], int]]) -> int:
        longest = max(len(prefix) for prefix, _ in chosen)
        lengths = [length for _, length in chosen]
        ids = torch.tensor([[0] * (longest - len(prefix)) + prefix for prefix, _ in chosen])
        mask = torch.tensor([[0] * (longest - len(prefix)) + [1] * len(prefix) for prefix, _ in chosen])
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(lengths),
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([LengthReached(longest, lengths)]),
        )
        return sum(lengths)

    model.generation_config.eos_token_id = None
    return lambda: sum(batch(rows[start : start + GENERATE_ROWS]) for start in range(0, len(rows), GENERATE_ROWS))


def generate_batch(work: Work) -> Run:
    """transformers' continuous batching (the engine of `generate_batch`); each request has its own length."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = transformers_model(work)
    settings = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    pairs = sorted(zip(work["prefixes"], work["lengths"], strict=True), key=lambda pair: pair[0], reverse=True)
    pending = [(prefix, length) for prefix, lengths in pairs for length in lengths]
    longest = max(len(prefix) + length for prefix, length in pending)
    blocks = -(-longest // 32) * 64  # memory for 64 of the longest sequences, in blocks of 32 tokens
    batching = ContinuousBatchingConfig(page_size=32, num_blocks=blocks, max_batch_tokens=512)

    def run() -> int:
        options = {"generation_config": settings, "continuous_batching_config": batching, "block": True}
        with model.continuous_batching_context_manager(**options, warmup=False) as manager:
            for prefix, length in pending:
                manager.add_request(prefix, max_new_tokens=length, eos_token_id=-1)
            tokens = done = 0
            while done < len(pending):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error:
                        raise RuntimeError(result.error)
                    done += 1
                    tokens += len(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("generate_batch stopped before all requests were finished")
        return tokens

    return run


def vllm(work: Work) -> Run:
    """vLLM on the CPU with prefix caching; the cache is cleared before each run, as after an update of the weights."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    longest = max(len(p) + max(ls) for p, ls in zip(work["prefixes"], work["lengths"], strict=True))
    engine = LLM(
        model=work["model"],
        dtype=work["dtype"],
        enable_prefix_caching=True,
        max_model_len=longest + 1,
        max_num_seqs=256,
        disable_log_stats=True,
    )
    prompts, settings = [], []
    for prefix, lengths in zip(work["prefixes"], work["lengths"], strict=True):
        for length in lengths:
            prompts.append(TokensPrompt(prompt_token_ids=prefix))
            settings.append(
                SamplingParams(max_tokens=length, min_tokens=length, ignore_eos=True, temperature=1.0, detokenize=False)
            )

    def run() -> int:
        engine.reset_prefix_cache()
        outputs = engine.generate(prompts, settings, use_tqdm=False)
        return sum(len(o.token_ids) for output in outputs for o in output.outputs)

    return run


def matmul(work: Work) -> Run:
    """Only the matrix products of the model's linear layers, for the number of rows that each position needs.

    This is not an engine. The weights are rearranged once, as in the native engine: the fastest form that we know.
    """
    import torch

    from vineppo.sampling.torch.packed import packed_weights

    model = transformers_model(work)
    head = model.get_output_embeddings()
    body = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    lengths = sorted(length for group in work["lengths"] for length in group)
    alive = [sum(length > position for length in lengths) for position in range(lengths[-1])]
    trunk_tokens = len({tuple(prefix[: i + 1]) for prefix in work["prefixes"] for i in range(len(prefix))})

    def products(layers: list[torch.nn.Linear], rows: int) -> None:
        for layer in layers:
            layer(torch.ones(rows, layer.in_features, dtype=layer.weight.dtype))

    @torch.no_grad()
    def run() -> int:
        with packed_weights(model):
            products(body, trunk_tokens)
            products([head], len(work["prefixes"]))
            for position, rows in enumerate(alive):
                if position:  # the logits of the prefixes give the first token
                    products([*body, head], rows)
        return sum(lengths)

    return run


ENGINES: dict[str, Callable[[Work], Run]] = {
    "native": native,
    "generate": generate,
    "generate_batch": generate_batch,
    "vllm": vllm,
    "matmul": matmul,
}


def peak_memory(root: int) -> int:
    """Sum of the peak resident memory of a process and its running descendants, in bytes (Linux)."""
    parents, peaks = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        pid = int(fields["Pid"])
        parents[pid] = int(fields["PPid"])
        peaks[pid] = int(fields.get("VmHWM", "0 kB").split()[0]) * 1024
    family = {root}
    while children := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= children
    return sum(peaks.get(pid, 0) for pid in family)


def main() -> None:
    """Load one engine and run it once per line of standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # because engines may print to stdout
    os.dup2(2, 1)
    work = json.loads(arguments.work.read_text())
    os.environ["OMP_NUM_THREADS"] = str(work["threads"])
    import torch

    torch.set_num_threads(work["threads"])
    torch.manual_seed(0)
    run = ENGINES[arguments.engine](work)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        tokens = run()
        seconds = time.perf_counter() - start
        print(
            json.dumps({"seconds": seconds, "tokens": tokens, "bytes": peak_memory(os.getpid())}),
            file=answers,
            flush=True,
        )


if __name__ == "__main__":
    main()
