"""List the fields of TRL's GRPOConfig that have one supported value, or that are accepted without effect.

docs/from-trl.md explains each of them; a test compares the two lists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from vineppo.config.messages import did_you_mean
from vineppo.types import UserError

FIXED: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, -1, None),
    "min_p": (None,),
    "repetition_penalty": (1.0,),
    "use_vllm": (False,),
    "loss_type": ("dapo", "bnpo", "grpo", "dr_grpo", None),
    "importance_sampling_level": ("token",),
    "sync_ref_model": (False,),
    "delta": (None,),
    "top_entropy_quantile": (1.0,),
    "fp16": (False,),
    "scale_rewards": ("group", True, "none", False),
    "eval_strategy": ("no", "steps", "epoch"),
    "save_strategy": ("steps", "epoch", "no"),
    "logging_strategy": ("steps", "epoch", "no"),
    "lr_scheduler_type": ("linear", "cosine", "constant", "constant_with_warmup"),
}
"""Fields of GRPOConfig for which only the listed values are supported. The first value is the default."""
NEUTRAL: dict[str, Any] = {
    "router_aux_loss_coef": None,
    "cast_lm_head_to_fp32": False,
    "generation_kwargs": None,
    "multi_objective_aggregation": "sum_then_normalize",
    "use_adaptive_entropy": False,
    "max_tool_calling_iterations": None,
    "off_policy_mask_threshold": None,
    "log_completions_hub_repo": None,
    "use_transformers_continuous_batching": False,
    "transformers_continuous_batching_config": None,
    "use_transformers_paged": False,
    "shuffle_dataset": True,
}
"""Fields of GRPOConfig that control a feature which is not supported. Only the listed value is accepted. It is the
default in TRL and switches the feature off."""
WITHOUT_EFFECT: dict[str, Any] = {
    "log_completions": False,
    "num_completions_to_print": None,
    "log_unique_prompts": False,
    "log_multimodal": True,
    "disable_dropout": False,
    "ds3_gather_for_generation": True,
    "max_prompt_length": None,
    "cache_implementation": None,
    "pad_to_multiple_of": "auto",
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "logging_dir": None,
    "vllm_mode": "colocate",
    "vllm_model_impl": "vllm",
    "vllm_enable_sleep_mode": False,
    "vllm_guided_decoding_regex": None,
    "vllm_structured_outputs_regex": None,
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0,
    "vllm_group_port": 51216,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": None,
    "vllm_tensor_parallel_size": 1,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_cap": None,
    "sapo_temperature_neg": 1.05,
    "sapo_temperature_pos": 1.0,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "entropy_coef_min": 0.0,
    "entropy_coef_max": 1.0,
    "entropy_coef_delta": 0.005,
    "entropy_target": 0.2,
}
"""Fields of GRPOConfig that are accepted with any value and have no effect, with their default values. Such a field
controls something that is always on here, always off, or part of an unsupported feature."""
WITHOUT_EFFECT_OF_TRANSFORMERS = (
    "remove_unused_columns",
    "logging_nan_inf_filter",
    "run_name",
    "disable_tqdm",
    "save_only_model",
    "eval_on_start",
    "per_device_eval_batch_size",
    "do_train",
    "do_eval",
    "tf32",
    "label_names",
    "gradient_checkpointing_kwargs",
    "torch_empty_cache_steps",
    "skip_memory_metrics",
    "average_tokens_across_devices",
    "include_num_input_tokens_seen",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "hub_model_id",
    "hub_strategy",
    "hub_token",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "dataloader_in_order",
)
"""Fields of TrainingArguments (transformers) that are accepted with any value and have no effect."""
INSTEAD = {
    "push_to_hub": "; after training, call trainer.model.push_to_hub and trainer.processing_class.push_to_hub",
    "use_vllm": "; settings={'sampler.engine': 'vllm'} samples with vLLM",
    "shuffle_dataset": "; every pass over the rows has a new random order",
}
"""Field that is not supported -> text for the error message: what to do instead."""


def check_other_field(name: str, value: Any, known: set[str]) -> None:
    """Check a field of GRPOConfig that VinePPOConfig does not define.

    Args:
        name: name of the field.
        value: value of the field.
        known: names of the fields of VinePPOConfig, for the hint in the message.
    Raises:
        UserError: if TRL has no field with this name, or if the value requires a feature that is not supported.
    """
    if name in WITHOUT_EFFECT or name in WITHOUT_EFFECT_OF_TRANSFORMERS:
        return
    neutral = {**transformers_defaults(), **NEUTRAL}
    if name not in neutral:
        hint = did_you_mean(name, {*known, *WITHOUT_EFFECT, *neutral}) or "docs/from-trl.md lists the fields"
        raise UserError(f"VinePPOConfig has no field {name}; {hint}")
    if value != neutral[name]:
        advice = INSTEAD.get(name, "")
        raise UserError(f"{name} is {value!r}, which is not supported; allowed: {neutral[name]!r}{advice}")


@functools.cache
def transformers_defaults() -> Mapping[str, Any]:
    """Return a mapping from the fields of transformers' TrainingArguments to their defaults.

    GRPOConfig inherits these fields. Fields without a default are left out.
    """
    from transformers import TrainingArguments

    factories = {f.name: f.default_factory for f in dataclasses.fields(TrainingArguments)}
    return {
        f.name: f.default if factories[f.name] is dataclasses.MISSING else factories[f.name]()  # type: ignore[operator]
        for f in dataclasses.fields(TrainingArguments)
        if f.default is not dataclasses.MISSING or factories[f.name] is not dataclasses.MISSING
    }
