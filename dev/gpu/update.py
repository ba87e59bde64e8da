"""Memory and seconds of an update, and the memory that `vineppo plan` predicts."""

from __future__ import annotations

import torch
from dev.gpu.part import Cells, Part
from dev.gpu.policies import BOTH, QWEN_05B, Dtype, random_policy, random_prompts

import vineppo
from vineppo.credit import find_algorithm
from vineppo.credit.sample import training_sample
from vineppo.model.modes import with_checkpointing
from vineppo.model.policy import Policy
from vineppo.plan.amounts import Amounts
from vineppo.plan.memory import memory_by_kind
from vineppo.plan.shape import count, shape_of
from vineppo.run.clock import peak_memory
from vineppo.training.parts import build_learner
from vineppo.types import Rollout


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
