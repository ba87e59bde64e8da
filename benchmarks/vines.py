"""Measure how long each engine takes to sample the Monte-Carlo (MC) rollouts of one VinePPO iteration.

    python benchmarks/vines.py --models embedded:judgement,runs/smollm2 --vllm-python .venv-vllm/bin/python \
        --llama-python .venv-llama/bin/python --out runs/vines

An engine is a program that samples continuations of prefixes. benchmarks/engines.py contains all engines; `engine` is
the compiled engine of this package, and `torch` its PyTorch sampler. An MC rollout is one of the K continuations with
which VinePPO estimates the value of a state.

The workload is determined once, with the PyTorch sampler: G responses to each of P problems are sampled and cut into
steps, and the lengths of K continuations of every state are recorded. Every engine then gets the same prefixes and the
same numbers of tokens, at the same temperature. Each engine has a separate process. In each of `--repeats` rounds,
every engine runs once, while the others are idle. `matmul` computes only the matrix products of the model for the same
tokens, with PyTorch. Reuse of continuations (`vineppo.reuse`) is off, because it would save tokens for the samplers of
this package only.

Every engine computes in the dtype in which it is fastest on this machine (`--dtype auto`). Before the rounds, engines
that have a choice (CHOICES) sample every fourth state in each dtype. vLLM uses bfloat16 if the CPU has instructions for
it. `generate_batch` uses the dtype of `generate`, and `matmul` that of `engine`.

The script prints a table and writes vines.json and vines.md. They contain for each engine the dtype, the seconds
(median, lowest, highest), tokens per second, the peak memory, and the median time divided by that of the compiled
engine. They also contain the time of the matrix products divided by the time of the compiled engine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from vineppo.config.schema import ModelConfig, TaskConfig
from vineppo.model.hardware import cpu_multiplies
from vineppo.model.location import resolve_model_path
from vineppo.model.policy import Policy
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.steps import build_splitter
from vineppo.tasks import build_task
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.judge import InProcess
from vineppo.training.rollouts import problem_range, sample_groups
from vineppo.types import Chat, Problem, SampleRequest, Task

ENGINES = ("engine", "torch", "generate", "generate_batch", "vllm", "llama_cpp", "matmul")
DTYPES = ("float32", "bfloat16", "float16")
CHOICES = {
    "engine": ("float32", "bfloat16"),
    "torch": ("float32", "bfloat16"),
    "generate": ("float32", "bfloat16"),
    "llama_cpp": ("float32", "bfloat16", "float16"),
}
"""Engine -> the dtypes among which `--dtype auto` chooses, if the CPU has instructions for bfloat16."""
FOLLOWERS = {"generate_batch": "generate", "matmul": "engine"}
"""Engine -> the engine whose dtype it uses with `--dtype auto`."""
CLEARLY = 0.9
"""A 16-bit dtype is chosen if it takes less than this share of the seconds of float32."""
INSTRUCTION = "Solve the problem step by step, one short line per step. End with a line `#### ` and the number.\n\n"
WORD_PROBLEMS = (
    "A baker makes 24 rolls in the morning and 18 in the afternoon. She sells 35 of them. How many rolls are left?",
    "Tom reads 15 pages a day. His book has 180 pages and he has read 60. How many more days does he need?",
    "A bus has 42 seats. At the first stop 17 people get on, at the second 12, and 5 get off. How many seats are free?",
    "Maria buys 3 pens for 2 dollars each and 4 books for 7 dollars each. She pays with 50. What is the change?",
    "A garden has 6 rows of 9 tomato plants. A storm breaks 13. Each other plant gives 5 tomatoes. How many?",
    "Two trains leave at the same time in opposite directions, at 60 and 80 km per hour. How far apart are they after "
    "3 hours?",
    "A tank holds 200 litres. It loses 4 litres an hour and gains 10 litres an hour. It starts at 50. When is it full?",
    "Ali has twice as many marbles as Ben, and Ben has 7 more than Cem. Cem has 12. How many have they together?",
)


class WordProblems:
    """A source of the problems in WORD_PROBLEMS, for models that are not embedded; implements `types.ProblemSource`."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def size(self, split: str) -> int:
        """Return the number of problems."""
        return len(WORD_PROBLEMS)

    def problem(self, split: str, index: int) -> Problem:
        """Return one of the problems. Its prompt is formatted with the model's chat template."""
        chat = Chat.of_user(INSTRUCTION + WORD_PROBLEMS[index])
        return Problem(id=str(index), prompt=self.policy.codec.chat_prompt(chat), chat=chat)

    def demonstration(self, split: str, index: int) -> tuple[str, str]:
        """Raise NotImplementedError, because this benchmark needs no demonstrations."""
        raise NotImplementedError


def grade_nothing(completions: list[str], **_: Any) -> list[float]:
    """Return 0 for every response, because this benchmark needs no rewards."""
    return [0.0] * len(completions)


def task_of(path: str, policy: Policy) -> Task:
    """Return the task `chain` with the level of an embedded model, or WORD_PROBLEMS for any other model.

    Args:
        path: `embedded:LEVEL` or a model directory.
        policy: the loaded model.
    """
    if path.startswith("embedded:"):
        return build_task(TaskConfig(level=path.split(":")[1], num_steps=10))
    return Graded(WordProblems(policy), InProcess((grade_nothing,)), ("nothing",), (1.0,))


def fast_dtype() -> Literal["float32", "bfloat16"]:
    """Return bfloat16 if this CPU has instructions for it, else float32, which is then several times faster."""
    return "bfloat16" if cpu_multiplies(torch.bfloat16) else "float32"


def workload(path: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the workload for a model: the prefix of every distinct state, and the lengths of its K continuations.

    Responses and continuations are sampled as in VinePPO.

    Args:
        path: `embedded:LEVEL` or a model directory.
        arguments: the parsed command line.
    Returns:
        The content of WORK.json without `dtype` (see benchmarks/engines.py), and the numbers of problems and of
        responses per problem.
    """
    embedded = path.startswith("embedded:")
    policy = Policy.load(ModelConfig(path=path, dtype="float32" if embedded else fast_dtype()))
    task = task_of(path, policy)
    num_problems, group_size, budget = (8, 4, 120) if embedded else (arguments.problems, arguments.group, 128)
    sampler = TorchSampler(policy)
    problems = problem_range(task, "train", num_problems)
    shape = {"group_size": group_size, "max_new_tokens": budget, "temperature": 1.0, "address": (0, "vines")}
    groups = sample_groups(problems, policy.codec, sampler, task, **shape)  # type: ignore[arg-type]
    cut = build_splitter("newline")
    requests: dict[tuple[int, ...], SampleRequest] = {}
    for group in groups:
        for rollout in group.rollouts:
            for start in (0, *cut(policy.codec.token_texts(rollout.response_ids))[:-1]):
                prefix = rollout.prompt_ids + rollout.response_ids[:start]
                requests[prefix] = SampleRequest(prefix, arguments.k, budget - start, seed=len(requests))
    sampled = sampler.sample(list(requests.values()))
    return {
        "model": resolve_model_path(path),
        "threads": arguments.threads,
        "problems": num_problems,
        "group_size": group_size,
        "prefixes": [list(prefix) for prefix in requests],
        "lengths": [[len(completion.token_ids) for completion in group] for group in sampled],
    }


class EngineError(RuntimeError):
    """Error for an engine that cannot run the model. The message has the reason."""


class Worker:
    """A process that runs benchmarks/engines.py with one engine.

    Args:
        python: the Python interpreter of the environment in which the engine is installed.
        engine: name of the engine.
        work: path of WORK.json. The log of the process is written next to it.
        threads: number of threads of the process.
    """

    def __init__(self, python: str, engine: str, work: Path, threads: int):
        command = [python, str(Path(__file__).with_name("engines.py")), engine, str(work)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.log = work.with_name(f"{engine}.log").open("w")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self.ready = self._line() == "ready"

    def run(self) -> dict[str, float]:
        """Let the process sample the workload once.

        Returns:
            `seconds`, `tokens` (number of sampled tokens) and `bytes` (peak memory of the process so far).
        Raises:
            EngineError: if the process has ended. The message is the last error message in the log of the process.
        """
        assert self.process.stdin is not None
        line = ""
        if self.ready:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            line = self._line()
        if not line:
            messages = Path(self.log.name).read_text().strip().splitlines()
            causes = [text for text in messages if "Error" in text and "EngineCore" not in text.rsplit("]", 1)[-1]]
            raise EngineError((causes or messages or ["the process ended"])[-1].rsplit("]", 1)[-1].strip()[:300])
        answer: dict[str, float] = json.loads(line)
        return answer

    def _line(self) -> str:
        """Wait for the next line from the process and return it; an empty text if the process has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """Close the standard input of the process, which makes the process end, and wait for its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def parse_dtypes(text: str) -> dict[str, str]:
    """Return the dtypes that `--dtype` sets: `auto`, one dtype for all engines, or `ENGINE=DTYPE,...`.

    Returns:
        Engine -> dtype, without the engines whose dtype is to be chosen.
    Raises:
        ValueError: if an engine or a dtype does not exist.
    """
    if text == "auto":
        return {}
    pairs = [part.partition("=") for part in text.split(",")] if "=" in text else [(e, "=", text) for e in ENGINES]
    for engine, _, dtype in pairs:
        if engine not in ENGINES:
            raise ValueError(f"--dtype names the engine {engine!r}; allowed: {', '.join(ENGINES)}")
        if dtype not in DTYPES:
            raise ValueError(
                f"--dtype has {dtype!r}; allowed: auto, a dtype, ENGINE=DTYPE,... with {', '.join(DTYPES)}"
            )
    return {engine: dtype for engine, _, dtype in pairs}


def best_dtype(seconds: dict[str, float]) -> str:
    """Return the dtype with the lowest time; float32, if no other one takes less than CLEARLY of its time.

    Args:
        seconds: dtype -> seconds.
    """
    fastest = min(seconds, key=lambda dtype: seconds[dtype])
    return fastest if seconds[fastest] < CLEARLY * seconds.get("float32", math.inf) else "float32"


def part_of(work: dict[str, Any]) -> dict[str, Any]:
    """Return the workload with every fourth state only, or with more of them if there are fewer than 32 states."""
    every = max(1, min(4, len(work["prefixes"]) // 8))
    return {**work, "prefixes": work["prefixes"][::every], "lengths": work["lengths"][::every]}


def choose_dtypes(
    work: dict[str, Any], engines: list[str], folder: Path, arguments: argparse.Namespace
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Choose the dtype of every engine.

    Args:
        work: the workload.
        engines: names of the engines.
        folder: an existing folder for files.
        arguments: the parsed command line.
    Returns:
        (engine -> dtype, engine -> dtype -> seconds). The latter contains the engines for which dtypes were compared,
        with the faster of two runs. A dtype in which the engine fails is left out.
    """
    chosen, trials = dict(arguments.dtype), {}
    fast = fast_dtype()
    for engine in {*engines, *(FOLLOWERS[engine] for engine in engines if engine in FOLLOWERS)} - {*chosen}:
        if engine not in FOLLOWERS:
            chosen[engine] = fast
    if fast == "bfloat16":
        for engine in (e for e in engines if e in CHOICES and e not in arguments.dtype):
            trials[engine] = compare_dtypes(part_of(work), engine, folder, arguments)
            chosen[engine] = best_dtype(trials[engine]) if trials[engine] else "float32"
            print(f"  {engine:15} " + ", ".join(f"{d} {s:.2f} s" for d, s in trials[engine].items()), flush=True)
    for engine, leader in FOLLOWERS.items():
        chosen.setdefault(engine, chosen.get(leader, fast))
    return {engine: chosen[engine] for engine in engines}, trials


def compare_dtypes(work: dict[str, Any], engine: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of an engine in each of its CHOICES, the faster of two runs."""
    seconds = {}
    for dtype in CHOICES[engine]:
        worker = start(engine, {**work, "dtype": dtype}, folder, arguments)
        try:
            seconds[dtype] = min(worker.run()["seconds"] for _ in range(2))
        except EngineError:
            continue
        finally:
            worker.close()
    return seconds


def start(engine: str, work: dict[str, Any], folder: Path, arguments: argparse.Namespace) -> Worker:
    """Start the process of an engine.

    Args:
        work: the workload with `dtype`. It is written into `folder`.
    """
    path = folder / f"{engine}.json"
    path.write_text(json.dumps(work))
    python = {"vllm": arguments.vllm_python, "llama_cpp": arguments.llama_python}.get(engine, sys.executable)
    return Worker(python, engine, path, arguments.threads)


def measure(work: dict[str, Any], engines: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the engines in turn: one warm-up round, which is not counted, then `--repeats` measured rounds.

    An engine that cannot run the model is left out, and its error is reported in `refused`. If `engine` cannot run the
    model, the script ends.

    Args:
        work: the workload.
        engines: names of the engines.
        arguments: the parsed command line.
    Returns:
        The results for one model, as in the `models` of vines.json.
    """
    tokens = sum(map(sum, work["lengths"]))
    print(f"\n{work['model']}: {len(work['prefixes'])} states, {tokens:,} tokens", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        dtypes, trials = choose_dtypes(work, engines, Path(folder), arguments)
        workers = {e: start(e, {**work, "dtype": dtypes[e]}, Path(folder), arguments) for e in engines}
        refused: dict[str, str] = {}
        runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
        for repeat in range(-1, arguments.repeats):
            for engine, worker in list(workers.items()):
                try:
                    answer = worker.run()
                except EngineError as error:
                    if engine == "engine":
                        raise
                    refused[engine] = str(error)
                    print(f"  {engine} cannot run this model: {error}", flush=True)
                    del workers[engine], runs[engine]
                    continue
                assert answer["tokens"] == tokens, f"{engine} generated {answer['tokens']} of {tokens} tokens"
                if repeat >= 0:
                    runs[engine].append(answer)
                print(
                    f"  {'warm-up' if repeat < 0 else repeat + 1:>7} {engine:15} {answer['seconds']:8.2f} s", flush=True
                )
        for worker in workers.values():
            worker.close()
    return {
        "states": len(work["prefixes"]),
        "problems": work["problems"],
        "group_size": work["group_size"],
        "tokens": tokens,
        "dtypes": dtypes,
        "dtype_seconds": trials,
        "refused": refused,
        **summary(runs, tokens, dtypes),
    }


def summary(runs: dict[str, list[dict[str, float]]], tokens: int, dtypes: dict[str, str]) -> dict[str, Any]:
    """Summarize the runs of all engines.

    Args:
        runs: name of an engine -> the result of each run.
        tokens: number of tokens that each run sampled.
        dtypes: name of an engine -> its dtype.
    Returns:
        `engines`, the dtype, the times and the peak memory of each engine; `ratio_vs`, the median time of each other
        engine divided by that of the compiled engine; `matmul_share`, the same ratio for the matrix products alone, or
        None if they were not measured.
    """
    engines: dict[str, dict[str, Any]] = {}
    for engine, answers in runs.items():
        seconds = [answer["seconds"] for answer in answers]
        engines[engine] = {
            "dtype": dtypes[engine],
            "seconds": median(seconds),
            "lowest": min(seconds),
            "highest": max(seconds),
            "tokens_per_second": tokens / median(seconds),
            "peak_memory_bytes": max(answer["bytes"] for answer in answers),
        }
    own = engines["engine"]["seconds"]
    ratios = {engine: r["seconds"] / own for engine, r in engines.items() if engine not in ("engine", "matmul")}
    share = engines["matmul"]["seconds"] / own if "matmul" in engines else None
    return {"engines": engines, "ratio_vs": ratios, "matmul_share": share}


def markdown(result: dict[str, Any]) -> str:
    """Return the text of vines.md.

    Args:
        result: the content of vines.json.
    """
    lines = [
        "# MC rollouts of one iteration with every engine",
        "",
        f"`{result['command']}` on {result['platform']}, {result['threads']} threads, torch {result['torch']}; medians "
        f"of {result['repeats']} runs (lowest to highest), the engines in alternation, each in the dtype in the table "
        "(`--dtype auto`: the fastest here). `engine` is the package's compiled engine, `torch` its PyTorch sampler.",
    ]
    for name, model in result["models"].items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{model['problems']} problems x {model['group_size']} responses, {model['states']} states, "
            f"K = {result['k']}, {model['tokens']:,} tokens.",
            "",
            "| engine | dtype | seconds | tokens per second | peak memory | engine is faster by |",
            "|---|---|---|---|---|---|",
        ]
        for engine, figures in model["engines"].items():
            ratio = model["ratio_vs"].get(engine)
            label = "matrix products alone" if engine == "matmul" else f"`{engine}`"
            times = f"{figures['seconds']:.2f} ({figures['lowest']:.2f} to {figures['highest']:.2f})"
            memory = "" if engine == "matmul" else f"{figures['peak_memory_bytes'] / 2**30:.2f} GiB"
            lines.append(
                f"| {label} | {figures['dtype']} | {times} | "
                f"{figures['tokens_per_second']:,.0f} | {memory} | {'' if ratio is None else f'{ratio:.2f}'} |"
            )
        lines += [
            f"| `{engine}` | does not run this model: {reason} | | | | |" for engine, reason in model["refused"].items()
        ]
        if model["matmul_share"] is not None:
            lines += ["", f"The matrix products alone are {model['matmul_share']:.0%} of the compiled engine's time."]
    return "\n".join(lines) + "\n"


def write(models: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write vines.json and vines.md for the models that have been measured.

    Args:
        models: name of a model -> the results of `measure`.
        arguments: the parsed command line.
    """
    result = {
        "command": " ".join(["python", "benchmarks/vines.py", *sys.argv[1:]]),
        "k": arguments.k,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "platform": platform.platform(),
        "models": models,
    }
    # The main results of each model are also at the top level of vines.json, under the name of the model.
    flat = {name: {"ratio_vs": m["ratio_vs"], "matmul_share": m["matmul_share"]} for name, m in models.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "vines.json").write_text(json.dumps({**flat, **result}, indent=1))
    (arguments.out / "vines.md").write_text(markdown(result))


def main() -> None:
    """Parse the arguments, run the measurements and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="embedded:judgement", help="embedded:NAME or model directories")
    parser.add_argument("--engines", default=",".join(ENGINES), help="must contain engine")
    parser.add_argument(
        "--vllm-python", help="interpreter of the environment with vLLM (`make bench-vines` creates it)"
    )
    parser.add_argument(
        "--llama-python", help="interpreter of the environment with llama-cpp-python (`make bench-vines` creates it)"
    )
    parser.add_argument(
        "--problems", type=int, default=4, help="P, number of problems, for models that are not embedded"
    )
    parser.add_argument(
        "--group", type=int, default=2, help="G, responses per problem, for models that are not embedded"
    )
    parser.add_argument("--k", type=int, default=9, help="K: continuations per state")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="auto: measure which dtype is fastest for each engine; or one dtype for all engines; or ENGINE=DTYPE,... "
        "and auto for the others",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="number of measured runs per engine")
    parser.add_argument("--out", type=Path, default=Path("runs/vines"))
    arguments = parser.parse_args()
    engines = arguments.engines.split(",")
    if unknown := set(engines) - set(ENGINES):
        parser.error(f"--engines has {', '.join(sorted(unknown))}; allowed: {', '.join(ENGINES)}")
    if "engine" not in engines:
        parser.error("--engines must contain engine, because the ratios are relative to it")
    for engine, option in (("vllm", "--vllm-python"), ("llama_cpp", "--llama-python")):
        if engine in engines and not getattr(arguments, option[2:].replace("-", "_")):
            parser.error(
                f"--engines has {engine}: set {option} (`make bench-vines` creates the environment), or leave it out"
            )
    try:
        arguments.dtype = parse_dtypes(arguments.dtype)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)
    models = {}
    for path in arguments.models.split(","):
        name = path.split(":")[-1] if path.startswith("embedded:") else Path(path).name
        models[name] = measure(workload(path, arguments), engines, arguments)
        write(models, arguments)
    print("\n" + (arguments.out / "vines.md").read_text())


if __name__ == "__main__":
    main()
