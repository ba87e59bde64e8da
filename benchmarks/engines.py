"""Run one sampling engine in a separate process, for benchmarks/vines.py. benchmarks/length.py imports some functions.

    python benchmarks/engines.py ENGINE WORK.json

An engine is a way to sample continuations of prefixes, for example the sampler of this package or vLLM. The process
loads the model and prints `ready`. For every line on standard input, it then samples the whole workload once and prints
one line of JSON: `seconds`, `tokens` (number of sampled tokens), and `bytes` (peak memory of the process so far). Only
the selected engine is imported, so each engine can be installed in a separate environment.

WORK.json contains the workload: `model`, a model directory; `dtype`; `threads`; `prefixes`, one list of token ids per
prefix; `lengths`, one list per prefix with the number of tokens of each of its continuations. End-of-sequence tokens
are ignored, and every continuation has exactly its length, so all engines do the same work.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

Work = dict[str, Any]
"""The workload, with the keys of WORK.json."""
Run = Callable[[], int]
"""Samples the whole workload once and returns the number of generated tokens."""

GENERATE_ROWS = 64
"""Number of sequences in a static batch of `generate`."""
LLAMA_OPTIONS = ((16, True), (64, True), (255, True), (64, False))
"""Options among which `llama_cpp` chooses: number of sequences that are decoded together (llama.cpp allows 256), and
whether all sequences share one buffer of keys and values."""
TRIAL_TOKENS = 24
"""Number of tokens of a continuation that `llama_cpp` samples to compare its options."""


def own_sampler(work: Work, name: Literal["engine", "torch"]) -> Run:
    """Load a sampler of this package.

    Args:
        name: the compiled engine or the PyTorch sampler, as in the setting `sampler.engine`.
    """
    from vineppo.config.schema import ModelConfig
    from vineppo.model.policy import Policy
    from vineppo.sampling.build import build_sampler
    from vineppo.types import SampleRequest

    policy = Policy.load(ModelConfig(path=work["model"], dtype=work["dtype"]))
    policy.codec = replace(policy.codec, eos_ids=())
    sampler = build_sampler(policy, name)
    requests = [
        SampleRequest(tuple(prefix), 1, length, seed=1000 * i + j)
        for i, (prefix, lengths) in enumerate(zip(work["prefixes"], work["lengths"], strict=True))
        for j, length in enumerate(lengths)
    ]
    return lambda: sum(len(c.token_ids) for group in sampler.sample(requests) for c in group)


def transformers_model(work: Work) -> Any:
    """Load the transformers model of a workload for inference, with the default attention of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
    model.eval().requires_grad_(False)
    return model


def generate(work: Work) -> Run:
    """Load transformers' `generate`, which samples static batches.

    The continuations are sorted by the length of their prefixes. Each batch has GENERATE_ROWS continuations, padded on
    the left. A continuation stops at its length, as if it had sampled an end-of-sequence token. A batch runs until all
    its continuations have stopped.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    model = transformers_model(work)
    pairs = zip(work["prefixes"], work["lengths"], strict=True)
    rows = sorted(((prefix, length) for prefix, lengths in pairs for length in lengths), key=lambda row: -len(row[0]))

    class LengthReached(StoppingCriteria):
        """Stops each row of a batch at the length of its continuation."""

        def __init__(self, prompt: int, lengths: list[int]):
            self.ends = torch.tensor(lengths) + prompt

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends

    def batch(chosen: list[tuple[list[int], int]]) -> int:
        """Sample one batch of (prefix, length of the continuation), and return the number of sampled tokens."""
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
    """Load transformers' continuous batching, the engine of `generate_batch`. Each continuation is a request."""
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
    """Load vLLM on the CPU, with prefix caching. Each run first clears the cache, as is needed when weights change."""
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


def llama_cpp(work: Work) -> Run:
    """Load llama.cpp, which decodes many sequences in each call and shares the keys and values of prefixes.

    The model is first converted to a GGUF file. Each of LLAMA_OPTIONS then samples up to TRIAL_TOKENS tokens of every
    continuation of a quarter of the trunks with all threads, the best of them also with one thread, and the fastest
    combination is used. With one thread, llama.cpp does not wait at the barriers between operations, which take most of
    the time of a very small model.
    """
    sys.path.insert(0, str(Path(__file__).parents[1]))  # This makes the folder `benchmarks` importable.
    from benchmarks.llama import Continuations, Options, trunks_of, write_gguf

    trunks = trunks_of(work["prefixes"], work["lengths"])
    sample = [trunk.shortened(TRIAL_TOKENS) for trunk in trunks[::4]]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf"
        write_gguf(Path(work["model"]), model, work["dtype"])

        def trial(options: Options, threads: int) -> Run:
            """Return a run over the beginnings of a quarter of the continuations, which loads and frees the model."""

            def run() -> int:
                continuations = Continuations(model, sample, options, threads)
                tokens = continuations.run()
                continuations.close()
                return tokens

            return run

        options = [Options(*option) for option in LLAMA_OPTIONS]
        best = options[fastest([trial(option, work["threads"]) for option in options])]
        threads = (work["threads"], 1)
        used = threads[fastest([trial(best, count) for count in threads])]
        print(f"llama.cpp: {best}, {used} threads", flush=True)
        return Continuations(model, trunks, best, used).run


def fastest(runs: Sequence[Run]) -> int:
    """Do every run once, and return the index of the one that took the least time."""
    seconds = []
    for run in runs:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds.index(min(seconds))


def matmul(work: Work) -> Run:
    """Prepare the matrix products that every engine must compute. This is not an engine.

    A run applies the model's linear layers to as many rows as an engine needs: first one row for each distinct prefix
    token, then, position by position, one row for each continuation that is not finished. The time is a lower bound for
    the engines that compute with PyTorch; other engines can be faster, for example for few rows. The products are
    computed with the weights as they are or, as in the PyTorch sampler, with packed copies of them, whichever is faster
    for this workload.
    """
    import torch

    from vineppo.sampling.torch.packed import packed_weights

    model = transformers_model(work)
    head = model.get_output_embeddings()
    body = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    lengths = sorted(length for group in work["lengths"] for length in group)
    alive = [sum(length > position for length in lengths) for position in range(lengths[-1])]
    # Prefixes that begin with the same tokens share the computation of these tokens.
    trunk_tokens = len({tuple(prefix[: i + 1]) for prefix in work["prefixes"] for i in range(len(prefix))})

    def products(layers: list[torch.nn.Linear], rows: int) -> None:
        """Apply each layer to a matrix with this number of rows."""
        for layer in layers:
            layer(torch.ones(rows, layer.in_features, dtype=layer.weight.dtype))

    @torch.no_grad()
    def plain() -> int:
        """Compute all products with the weights as they are."""
        products(body, trunk_tokens)
        products([head], len(work["prefixes"]))
        for position, rows in enumerate(alive):
            if position:  # The first token of a continuation is sampled from the logits of its prefix.
                products([*body, head], rows)
        return sum(lengths)

    def packed() -> int:
        """Compute all products with packed copies of the weights."""
        with packed_weights(model):
            return plain()

    choices = (plain, packed)
    return choices[fastest(choices)]


ENGINES: dict[str, Callable[[Work], Run]] = {
    "engine": functools.partial(own_sampler, name="engine"),
    "torch": functools.partial(own_sampler, name="torch"),
    "generate": generate,
    "generate_batch": generate_batch,
    "vllm": vllm,
    "llama_cpp": llama_cpp,
    "matmul": matmul,
}
"""Name of an engine -> function that loads the engine with a workload and returns a function that samples the workload
once."""


def peak_memory(root: int) -> int:
    """Return the sum of the peak resident memory of a process and of its running descendants, in bytes (Linux only).

    Args:
        root: id of the process.
    """
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
    """Load the engine named on the command line, and run it once for each line of standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    # Engines may print to stdout. Therefore stdout becomes stderr, and results go to a copy of the earlier stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = json.loads(arguments.work.read_text())
    os.environ["OMP_NUM_THREADS"] = str(work["threads"])
    if arguments.engine != "llama_cpp":  # Its environment does not contain PyTorch.
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
