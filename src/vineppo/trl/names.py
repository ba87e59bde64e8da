"""Replace names of settings in error messages by the names of the fields and arguments that a trainer has for them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from vineppo.types import UserError

FIELD_OF: dict[str, str] = {
    "algorithm": "algorithm",
    "learner.lr": "learning_rate",
    "learner.warmup_updates": "warmup_steps",
    "learner.decay": "lr_scheduler_type",
    "learner.weight_decay": "weight_decay",
    "learner.betas": "adam_beta1, adam_beta2",
    "learner.max_grad_norm": "max_grad_norm",
    "learner.epochs": "num_iterations",
    "learner.minibatch_size": "per_device_train_batch_size x gradient_accumulation_steps",
    "learner.clip_low": "epsilon",
    "learner.clip_high": "epsilon_high",
    "learner.reduction": "loss_type",
    "learner.mask_truncated": "mask_truncated_completions",
    "learner.entropy_coefficient": "entropy_coef",
    "learner.kl.coefficient": "beta",
    "learner.kl.importance_weighted": "use_bias_correction_kl",
    "rollouts.num_problems": "per_device_train_batch_size x steps_per_generation",
    "rollouts.group_size": "num_generations",
    "rollouts.temperature": "temperature",
    "rollouts.max_new_tokens": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "task.rewards": "reward_funcs",
    "task.chat_template_kwargs": "chat_template_kwargs",
    "task.reward_weights": "reward_weights",
    "eval.every": "eval_steps",
    "eval.num_samples": "num_generations_eval",
    "eval.temperature": "temperature",
    "run.dir": "output_dir",
    "run.seed": "seed",
    "run.iterations": "num_train_epochs",
    "run.max_updates": "max_steps",
    "run.checkpoint_every": "save_steps",
    "run.keep_checkpoints": "save_total_limit",
    "run.report_to": "report_to",
    "model.path": "model",
    "model.gradient_checkpointing": "gradient_checkpointing",
    "model.trust_remote_code": "trust_remote_code",
    "vineppo.num_mc_rollouts": "num_mc_rollouts",
    "vineppo.splitter": "splitter",
    "grpo.scale_by_std": "scale_rewards",
    "ppo.value_lr": "learning_rate",
}
"""Setting of `vineppo train` -> the field of VinePPOConfig, or the argument of VinePPOTrainer, that determines it."""


class FieldNames:
    """Replaces the names of settings in messages.

    Args:
        changed: setting -> field, where the field that determines the setting differs from `FIELD_OF`.
        kept: settings that the user gave by their dotted keys; their names are not replaced.
    """

    def __init__(self, changed: Mapping[str, str], kept: Collection[str]) -> None:
        self.field_of = {key: name for key, name in {**FIELD_OF, **changed}.items() if key not in kept}
        keys = "|".join(re.escape(key) for key in sorted(self.field_of, key=len, reverse=True) if key != "algorithm")
        self._pattern = re.compile(rf"(?<![\w./])(?:--)?({keys})(?![\w/]|\.\w)")

    def translate(self, message: str) -> str:
        """Return a message with the names of fields in place of the names of settings and options."""
        message = re.sub(r"--resume \S+", "resume_from_checkpoint=True", message)
        message = message.replace("remove those options", "restore the old values")
        return self._pattern.sub(lambda match: self.field_of[match[1]], message)

    @contextmanager
    def in_errors(self) -> Iterator[None]:
        """Translate the message of every UserError that is raised in the block."""
        try:
            yield
        except UserError as error:
            message = self.translate(str(error))
            if message == str(error):
                raise
            raise UserError(message) from error.__cause__
