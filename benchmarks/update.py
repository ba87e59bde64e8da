"""Measure how long the training on the rollouts of one iteration takes, and how much memory it needs.

    python benchmarks/update.py --models embedded:judgement,runs/smollm2 --out runs/update

Three forms of the same training are compared: two epochs over the same sequences with the same advantages, a KL penalty
in the loss, and one optimizer step per epoch.

- `vineppo`: the learner of this package.
- `plain`: the same learner without its savings (`learning.scores.Savings`): padded sequences, no shared prompts, a
  separate forward pass for the old log-probabilities, and all logits at once.
- `trl`: the loss of TRL's `GRPOTrainer` and its optimizer, with forward passes for the log-probabilities under the old
  policy and under the reference, as in its training with two iterations over a batch.

Each form has a separate process. In each of `--repeats` rounds after a warm-up, every form trains once, while the
others are idle. The script prints a table and writes update.json and update.md: for each form the seconds (median,
lowest, highest), the peak memory of the process, and the number of tokens that go through the policy. The ratios are
the seconds of `vineppo` divided by those of another form, so that less than 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

FORMS = ("vineppo", "plain", "trl")
EPOCHS, LR, KL, TEMPERATURE, MAX_GRAD_NORM = 2, 1e-5, 1e-3, 1.0, 1.0


def workload(path: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Sample the rollouts of one iteration.

    The advantages are 1 and -1 in turn, because their values do not change the time.

    Args:
        path: `embedded:LEVEL` or a model directory.
        arguments: the parsed command line.
    Returns:
        The content of the file that the processes of the forms read.
    """
    from vines import task_of  # type: ignore[import-not-found]  # a script next to this one

    from vineppo.config.schema import ModelConfig
    from vineppo.model.location import resolve_model_path
    from vineppo.model.policy import Policy
    from vineppo.sampling.torch.sampler import TorchSampler
    from vineppo.training.rollouts import problem_range, sample_groups

    embedded = path.startswith("embedded:")
    policy = Policy.load(ModelConfig(path=path, dtype="float32"))
    task = task_of(path, policy)
    num_problems, group_size, budget = (
        (8, 4, 120) if embedded else (arguments.problems, arguments.group, arguments.tokens)
    )
    groups = sample_groups(
        problem_range(task, "train", num_problems),
        policy.codec,
        TorchSampler(policy),
        task,
        group_size=group_size,
        max_new_tokens=budget,
        temperature=TEMPERATURE,
        address=(0, "update"),
    )
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        "model": resolve_model_path(path),
        "threads": arguments.threads,
        "problems": num_problems,
        "group_size": group_size,
        "prompts": [list(r.prompt_ids) for r in rollouts],
        "responses": [list(r.response_ids) for r in rollouts],
        "advantages": [1.0 if i % 2 else -1.0 for i in range(len(rollouts))],
    }


def count_tokens(model: Any) -> list[int]:
    """Return a list with one number, which every forward pass of the model increases by its number of tokens."""
    tokens = [0]

    def count(_module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        tokens[0] += keywords["input_ids"].numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    return tokens


def own_training(work: dict[str, Any], form: str) -> tuple[Callable[[], Any], list[int]]:
    """Return (function that trains once with the learner of this package, its number of tokens)."""
    from vineppo.config.schema import KLConfig, LearnerConfig, ModelConfig
    from vineppo.learning.learner import TorchLearner
    from vineppo.learning.scores import Savings
    from vineppo.model.policy import Policy, Reference
    from vineppo.types import TrainingSample

    policy = Policy.load(ModelConfig(path=work["model"], dtype="float32"))
    samples = [
        TrainingSample(
            token_ids=(*prompt, *response),
            loss_mask=(0,) * len(prompt) + (1,) * len(response),
            sampler_logprobs=(0.0,) * (len(prompt) + len(response)),
            advantages=(0.0,) * len(prompt) + (advantage,) * len(response),
        )
        for prompt, response, advantage in zip(work["prompts"], work["responses"], work["advantages"], strict=True)
    ]
    kl = KLConfig(coefficient=KL, reduction="token_mean")
    learner = TorchLearner(
        policy,
        Reference(policy),
        None,
        LearnerConfig(lr=LR, epochs=EPOCHS, minibatch_size=len(samples), max_grad_norm=MAX_GRAD_NORM, kl=kl),
        None,
        temperature=TEMPERATURE,
        total_updates=1000,
        seed=0,
        savings=Savings() if form == "vineppo" else Savings(packed=False, first_forward=False, chunked=False),
    )
    tokens = count_tokens(policy.model)
    return lambda: learner.update(samples, 1, len(samples)), tokens


def trl_training(work: dict[str, Any], folder: str) -> tuple[Callable[[], Any], list[int]]:
    """Return (function that trains once with the loss and the optimizer of TRL, its number of tokens)."""
    from datasets import Dataset

    from trl import GRPOConfig, GRPOTrainer

    count = len(work["prompts"])
    arguments = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=count,
        num_generations=work["group_size"],
        num_iterations=EPOCHS,
        learning_rate=LR,
        beta=KL,
        loss_type="bnpo",
        max_grad_norm=MAX_GRAD_NORM,
        temperature=TEMPERATURE,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=work["model"],
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * count),
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    left, right = (max(map(len, work[name])) for name in ("prompts", "responses"))
    prompts = torch.tensor([[0] * (left - len(row)) + row for row in work["prompts"]])  # (B, left)
    prompt_mask = torch.tensor([[0] * (left - len(row)) + [1] * len(row) for row in work["prompts"]])
    responses = torch.tensor([row + [0] * (right - len(row)) for row in work["responses"]])  # (B, right)
    mask = torch.tensor([[1] * len(row) + [0] * (right - len(row)) for row in work["responses"]])
    inputs = {"prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": responses, "completion_mask": mask}
    inputs["advantages"] = torch.tensor(work["advantages"])
    whole = (torch.cat([prompts, responses], 1), torch.cat([prompt_mask, mask], 1), right)
    tokens = count_tokens(trainer.model)

    def train() -> None:
        """Train once."""
        trainer.model.train()
        with torch.no_grad():
            old = trainer._get_per_token_logps_and_entropies(trainer.model, *whole)[0]
            ref = trainer._get_per_token_logps_and_entropies(trainer.ref_model, *whole)[0]
        for _ in range(EPOCHS):
            batch = {**inputs, "old_per_token_logps": old, "ref_per_token_logps": ref}
            trainer.compute_loss(trainer.model, batch).backward()
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), MAX_GRAD_NORM)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

    return train, tokens


def serve(form: str, path: Path) -> None:
    """Train once for each line of the standard input, and answer with a line of JSON.

    Args:
        form: one of FORMS.
        path: the file with the workload.
    """
    work = json.loads(path.read_text())
    torch.set_num_threads(work["threads"])
    answers, sys.stdout = sys.stdout, sys.stderr
    train, tokens = trl_training(work, str(path.parent / "trl")) if form == "trl" else own_training(work, form)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        tokens[0], began = 0, time.perf_counter()
        train()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps({"seconds": seconds, "tokens": tokens[0], "bytes": peak}), file=answers, flush=True)


def measure(work: dict[str, Any], forms: list[str], repeats: int) -> dict[str, Any]:
    """Train with the forms in turn: one warm-up round, which is not counted, then the measured rounds.

    Returns:
        The results for one model, as in the `models` of update.json.
    """
    runs: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.json"
        path.write_text(json.dumps(work))
        environment = {**os.environ, "OMP_NUM_THREADS": str(work["threads"])}
        workers = {}
        for form in forms:
            command = [sys.executable, __file__, "--serve", form, "--work", str(path)]
            workers[form] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        for form, worker in workers.items():
            assert worker.stdin is not None and worker.stdout is not None
            if worker.stdout.readline().strip() != "ready":
                raise SystemExit(f"the process of {form} has ended; its error message is above")
        for repeat in range(-1, repeats):
            for form, worker in workers.items():
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
                answer = json.loads(worker.stdout.readline())
                if repeat >= 0:
                    runs[form].append(answer)
                print(f"  {'warm-up' if repeat < 0 else repeat + 1:>7} {form:8} {answer['seconds']:8.3f} s", flush=True)
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait(timeout=60)
    figures = {
        form: {
            "seconds": median(answer["seconds"] for answer in answers),
            "lowest": min(answer["seconds"] for answer in answers),
            "highest": max(answer["seconds"] for answer in answers),
            "peak_memory_bytes": max(answer["bytes"] for answer in answers),
            "tokens": answers[-1]["tokens"],
        }
        for form, answers in runs.items()
    }
    own = figures["vineppo"]["seconds"]
    ratios = {f"seconds_ratio_vs_{form}": own / figures[form]["seconds"] for form in forms if form != "vineppo"}
    shape = {key: work[key] for key in ("problems", "group_size")}
    lengths = [len(p) + len(r) for p, r in zip(work["prompts"], work["responses"], strict=True)]
    return {**ratios, **shape, "tokens_of_the_sequences": sum(lengths), "forms": figures}


def markdown(result: dict[str, Any]) -> str:
    """Return the text of update.md from the content of update.json."""
    lines = [
        "# Training on the rollouts of one iteration",
        "",
        f"`{result['command']}` on {result['platform']}, {result['threads']} threads, torch {result['torch']}, "
        f"float32; medians of {result['repeats']} runs (lowest to highest), the forms in alternation. Two epochs with "
        "one optimizer step each and a KL penalty in the loss. `plain` is the learner of `vineppo` without its "
        "savings, `trl` the loss and the optimizer of TRL's `GRPOTrainer`. Tokens are those that go through the "
        "policy, with padding, without those of the reference.",
    ]
    for name, model in result["models"].items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{model['problems']} problems x {model['group_size']} responses, "
            f"{model['tokens_of_the_sequences']:,} tokens.",
            "",
            "| form | seconds | tokens | peak memory | seconds of vineppo / seconds |",
            "|---|---|---|---|---|",
        ]
        for form, figures in model["forms"].items():
            ratio = model.get(f"seconds_ratio_vs_{form}")
            lines.append(
                f"| `{form}` | {figures['seconds']:.3f} ({figures['lowest']:.3f} to {figures['highest']:.3f}) | "
                f"{figures['tokens']:,} | {figures['peak_memory_bytes'] / 2**30:.2f} GiB | "
                f"{'' if ratio is None else f'{ratio:.2f}'} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the arguments, run the measurements and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="embedded:judgement", help="embedded:NAME or model directories")
    parser.add_argument("--forms", default=",".join(FORMS), help="must contain vineppo")
    parser.add_argument("--problems", type=int, default=2, help="number of problems, for models that are not embedded")
    parser.add_argument("--group", type=int, default=4, help="responses per problem, for models that are not embedded")
    parser.add_argument(
        "--tokens", type=int, default=128, help="tokens of a response at most, for models that are not embedded"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="number of measured runs per form")
    parser.add_argument("--out", type=Path, default=Path("runs/update"))
    parser.add_argument("--serve", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.work)
        return
    forms = arguments.forms.split(",")
    if set(forms) - set(FORMS) or "vineppo" not in forms:
        parser.error(f"--forms is {arguments.forms}; allowed: {', '.join(FORMS)}, and vineppo among them")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    models = {}
    for path in arguments.models.split(","):
        name = path if path.startswith("embedded:") else Path(path).name
        print(f"\n{name}", flush=True)
        models[name] = measure(workload(path, arguments), forms, arguments.repeats)
    first = models.get("embedded:judgement", next(iter(models.values())))
    result = {
        **{key: value for key, value in first.items() if key.startswith("seconds_ratio")},
        "command": " ".join(["python", "benchmarks/update.py", *sys.argv[1:]]),
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "platform": platform.platform(),
        "models": models,
    }
    (arguments.out / "update.json").write_text(json.dumps(result, indent=1))
    (arguments.out / "update.md").write_text(markdown(result))
    print("\n" + markdown(result))


if __name__ == "__main__":
    main()
