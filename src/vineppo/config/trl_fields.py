"""Map the field names of TRL's GRPOConfig, and usual names of adapter settings, to the settings of this package."""

from __future__ import annotations

SAME_VALUE = {
    "num_generations": "rollouts.group_size",
    "temperature": "rollouts.temperature",
    "max_completion_length": "rollouts.max_new_tokens",
    "learning_rate": "learner.lr",
    "num_iterations": "learner.epochs",
    "epsilon": "learner.clip_low",
    "beta": "learner.kl.coefficient",
    "use_bias_correction_kl": "learner.kl.importance_weighted",
    "weight_decay": "learner.weight_decay",
    "max_grad_norm": "learner.max_grad_norm",
    "entropy_coef": "learner.entropy_coefficient",
    "output_dir": "run.dir",
    "seed": "run.seed",
}
"""Field of TRL -> setting that takes the same value."""

RELATED = {
    "epsilon_high": "learner.clip_high",
    "per_device_train_batch_size": "learner.minibatch_size",
    "gradient_accumulation_steps": "learner.minibatch_size",
    "steps_per_generation": "rollouts.num_problems",
    "generation_batch_size": "rollouts.num_problems",
    "num_generations_eval": "eval.num_samples",
    "num_train_epochs": "run.iterations",
    "max_steps": "run.max_updates",
    "warmup_steps": "learner.warmup_updates",
    "warmup_ratio": "learner.warmup_updates",
    "lr_scheduler_type": "learner.decay",
    "adam_beta1": "learner.betas",
    "adam_beta2": "learner.betas",
    "eval_steps": "eval.every",
    "save_steps": "run.checkpoint_every",
    "save_total_limit": "run.keep_checkpoints",
    "resume_from_checkpoint": "resume",
    "mask_truncated_completions": "task.grading.truncated",
    "reward_funcs": "task.rewards",
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
"""Field of TRL or name of an adapter setting -> setting that controls the same thing, with other values."""


def setting_for(name: str) -> str | None:
    """Return the setting that corresponds to a field of TRL, or None if there is no such field.

    Args:
        name: name of the field, with `-` or `_` between its words.
    """
    return (SAME_VALUE | RELATED).get(name.replace("-", "_"))
