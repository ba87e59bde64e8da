"""Map the settings of this package to the names of the fields of TRL's GRPOConfig that control the same thing."""

from __future__ import annotations

import re

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
_OTHER_NAMES = {
    "generation_batch_size": "rollouts.num_problems",
    "warmup_ratio": "learner.warmup_updates",
    "resume_from_checkpoint": "resume",
    "dataset_name": "task.train_path",
    "train_dataset": "task.train_path",
    "train_file": "task.train_path",
    "eval_dataset": "task.validation_path",
    "model_name_or_path": "model.path",
    "bf16": "model.dtype",
    "torch_dtype": "model.dtype",
    "use_cpu": "model.device",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.targets",
}
"""Usual name of an option in scripts for TRL or peft -> setting that controls the same thing."""


def settings_for(name: str) -> list[str]:
    """Return the settings that control the same as a field of TRL, the best one first. The list may be empty.

    Args:
        name: name of the field, with `-` or `_` between its words.
    """
    field = name.replace("-", "_")
    keys = [key for key, fields in FIELD_OF.items() if field in re.split(r" x |, ", fields)]
    return [*keys, *([_OTHER_NAMES[field]] if field in _OTHER_NAMES else [])]
