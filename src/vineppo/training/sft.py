"""Supervised fine-tuning (SFT) of a model on a task's demonstrations, for `vineppo sft`.

A demonstration is a prompt with a response to imitate. The loss is the cross-entropy of the tokens of the response and
of the token that ends it: the token with which the chat template ends a turn, or else the tokenizer's end-of-sequence
(EOS) token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from vineppo.config.schema import SFTConfig
from vineppo.learning.optim import Optimizer
from vineppo.model.codec import Codec
from vineppo.model.loading import device_errors_in_one_line
from vineppo.model.location import NEW_TINY
from vineppo.model.policy import Policy
from vineppo.run.environment import require_one_process
from vineppo.seeds import shuffled_index
from vineppo.tasks import build_task
from vineppo.training.preflight import check_sft
from vineppo.training.supervised import Demonstration, accumulate, linear_step
from vineppo.types import Problem, Task, UserError


def run_sft(config: SFTConfig, report: Callable[[str], None] = print) -> dict[str, float | str]:
    """Train the model `config.model` on the task's demonstrations, and save it in the directory `config.out`.

    Args:
        report: receives a line of text about the progress after each twentieth of the updates.
    Returns:
        A dictionary with `out` (the directory), `loss` (in nats per token, mean over the last tenth of the updates),
        `updates`, `tokens` (number of trained tokens) and `seconds`. `left out` is the number of demonstrations that
        were skipped because they were longer than `config.max_length`; it is missing if there were none.
    Raises:
        UserError: if `config.out` exists and is not an empty directory, if the task has no demonstrations, or if all
            demonstrations of an update are too long.
    """
    require_one_process()
    check_sft(config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    policy = _starting_policy(config)
    task = build_task(config.task, policy.codec.chat_prompt)
    optimizer = Optimizer(policy.model.parameters(), (0.9, 0.99), config.weight_decay)
    warmup = round(config.warmup_fraction * config.updates)
    losses, tokens, left_out, began = [], 0, 0, time.perf_counter()
    for update in range(config.updates):
        batch = _batch(config, policy.codec, task, update)
        left_out += config.batch_size - len(batch)
        loss, counted = accumulate(policy, batch, config.micro_batch_tokens)
        linear_step(optimizer, config.lr, update, warmup, config.updates, max_grad_norm=1.0)
        losses.append(loss)
        tokens += counted
        if (update + 1) % max(1, config.updates // 20) == 0:
            report(f"update {update + 1}/{config.updates}  loss {loss:.4f}  {time.perf_counter() - began:.0f} s")
    policy.save(out)
    tail = losses[-max(1, len(losses) // 10) :]
    seconds = time.perf_counter() - began
    return {
        "out": str(out),
        "loss": sum(tail) / len(tail),
        "updates": config.updates,
        "tokens": tokens,
        **({"left out": left_out} if left_out else {}),
        "seconds": seconds,
    }


def _starting_policy(config: SFTConfig) -> Policy:
    """Load the model to start from, or build it if `config.model.path` is "new:tiny"."""
    if config.model.path != NEW_TINY:
        return Policy.load(config.model)
    from vineppo.model.tiny import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    with device_errors_in_one_line(config.model.device):
        model = build_model(tokenizer, config.seed).to(config.model.device)
    return Policy(model, Codec.for_model(model, tokenizer))


def encode_demonstration(codec: Codec, problem: Problem, response: str) -> Demonstration:
    """Return (token ids of the prompt and of the complete response, number of prompt tokens)."""
    prompt_ids = codec.prompt_ids(problem)
    return (*prompt_ids, *codec.response_ids(problem, response)), len(prompt_ids)


def _batch(config: SFTConfig, codec: Codec, task: Task, update: int) -> list[Demonstration]:
    """Return the demonstrations of an update, without those longer than `config.max_length`.

    If the number of demonstrations is unlimited, each is used once. Otherwise they are used in passes over the split
    `train`, and each pass has a new random order.

    Args:
        update: number of the update, counted from 0.
    Raises:
        UserError: if all demonstrations of the update are too long.
    """
    size = task.size("train")
    first = update * config.batch_size
    batch: list[Demonstration] = []
    for position in range(first, first + config.batch_size):
        index = position if size is None else shuffled_index(position, size, "sft order", config.seed)
        prompt, response = task.demonstration("train", index)
        problem = task.problem("train", index)
        if prompt != problem.prompt:  # the task demonstrates another problem, such as a shorter one
            problem = Problem(id=problem.id, prompt=prompt)
        item = encode_demonstration(codec, problem, response)
        if len(item[0]) <= config.max_length:
            batch.append(item)
    if not batch:
        raise UserError(
            f"all demonstrations of an update are longer than max_length {config.max_length}; raise max_length"
        )
    return batch
