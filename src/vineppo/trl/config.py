"""Define `VinePPOConfig`, the settings of `VinePPOTrainer`, with the field names and defaults of TRL's GRPOConfig.

`VinePPOConfig.to_config` converts them to `vineppo.config.schema.Config`, the settings of `vineppo train`.
docs/from-trl.md lists for each field the corresponding setting of `vineppo train`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vineppo.config.messages import did_you_mean
from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.training.configure import config_from_dict, refuse_settings_of_other_algorithms
from vineppo.types import UserError

_FIXED: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, -1, None),
    "min_p": (None,),
    "repetition_penalty": (1.0,),
    "use_vllm": (False,),
    "loss_type": ("dapo", "bnpo", None),
    "mask_truncated_completions": (False,),
    "importance_sampling_level": ("token",),
    "sync_ref_model": (False,),
    "delta": (None,),
    "top_entropy_quantile": (1.0,),
    "fp16": (False,),
    "scale_rewards": ("group", True, "none", False),
    "eval_strategy": ("no", "steps", "epoch"),
}
"""Fields of GRPOConfig for which only the listed values are supported. The first value is the default."""
_NEUTRAL: dict[str, Any] = {
    "router_aux_loss_coef": None,
    "cast_lm_head_to_fp32": False,
    "generation_kwargs": None,
    "chat_template_kwargs": None,
    "multi_objective_aggregation": "sum_then_normalize",
    "use_adaptive_entropy": False,
    "max_tool_calling_iterations": None,
    "off_policy_mask_threshold": None,
    "log_completions_hub_repo": None,
    "use_transformers_continuous_batching": False,
    "transformers_continuous_batching_config": None,
    "use_transformers_paged": False,
}
"""Fields of GRPOConfig that control a feature which is not supported. Only the listed value is accepted. It is the
default in TRL and switches the feature off."""
_WITHOUT_EFFECT: dict[str, Any] = {
    "log_completions": False,
    "num_completions_to_print": None,
    "log_unique_prompts": False,
    "log_multimodal": True,
    "disable_dropout": False,
    "shuffle_dataset": True,
    "ds3_gather_for_generation": True,
    "max_prompt_length": None,
    "cache_implementation": None,
    "pad_to_multiple_of": "auto",
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "logging_dir": None,
}
"""Fields of GRPOConfig that are accepted with any value and have no effect, with their default values. Such a field
controls something that is always on here, always off, or part of an unsupported feature."""
_WITHOUT_EFFECT_BEGINNINGS = (
    "vllm_",
    "sapo_",
    "vespo_",
    "entropy_coef_",
    "entropy_target",
    "dataloader_",
    "log_",
    "hub_",
)
"""A field whose name begins with one of these texts is accepted with any value and has no effect."""
_WITHOUT_EFFECT_OF_TRANSFORMERS = (
    "remove_unused_columns",
    "logging_strategy",
    "logging_first_step",
    "logging_nan_inf_filter",
    "run_name",
    "disable_tqdm",
    "save_strategy",
    "save_only_model",
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
)
"""Fields of TrainingArguments (transformers) that are accepted with any value and have no effect."""


@dataclass
class VinePPOConfig:
    """Settings of `VinePPOTrainer`.

    `algorithm`, `num_mc_rollouts`, `splitter` and `settings` do not exist in GRPOConfig. The other fields have the same
    names and defaults as in GRPOConfig; docs/from-trl.md lists the exceptions. The constructor also accepts fields of
    GRPOConfig that this class does not define. If such a field controls an unsupported feature, it must have the value
    that switches the feature off.

    Callbacks read the fields as attributes of their `args`. Therefore every field of GRPOConfig that the constructor
    accepts can be read as an attribute. If it was not set, it has its default value in TRL or transformers.

    Raises:
        UserError: for an unknown field, or a value that is not supported.
    """

    output_dir: str = "vineppo-output"
    """The run directory, to which checkpoints, metrics and the trained model are written."""
    algorithm: str = "vineppo"
    """Algorithm that computes the credit: `vineppo`, `ppo`, `grpo`, `rloo`, `reinforce`, or `module:object` for a
    user-defined algorithm."""
    num_mc_rollouts: int = 9
    """K: number of continuations that `vineppo` samples from the state before each reasoning step."""
    splitter: str = "newline"
    """How `vineppo` cuts a response into reasoning steps, for example `newline` or `tokens:16`. `vineppo train --help`
    lists the values of this setting as `vineppo.splitter`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other settings of `vineppo train` by dotted key, such as `{"vineppo.alternatives": True}`. They override the
    fields of this class. Keys of the section `model` are not allowed, because the model is an argument of the
    trainer."""
    learning_rate: float = 1e-6
    per_device_train_batch_size: int = 8
    """An update uses `per_device_train_batch_size` * `gradient_accumulation_steps` responses."""
    gradient_accumulation_steps: int = 1
    steps_per_generation: int | None = None
    """An iteration samples `per_device_train_batch_size` * `steps_per_generation` responses; None means
    `gradient_accumulation_steps`."""
    generation_batch_size: int | None = None
    """Number of responses that an iteration samples. If it is set, `steps_per_generation` is not used."""
    num_generations: int = 8
    """G: number of responses per prompt. `grpo` and `rloo` require at least 2."""
    num_generations_eval: int | None = None
    """Number of responses to each prompt of `eval_dataset`; None means `num_generations`."""
    max_completion_length: int = 512
    num_train_epochs: float = 3.0
    max_steps: int = -1
    """Number of optimizer updates; -1 means that `num_train_epochs` determines the number."""
    num_iterations: int = 1
    """Number of passes over the rollouts of each iteration."""
    temperature: float = 1.0
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    epsilon: float = 0.2
    epsilon_high: float | None = None
    scale_rewards: str | bool = "group"
    """For `grpo`: `group` or True divides advantages by the standard deviation of the rewards of the group; `none` or
    False does not divide."""
    reward_weights: Sequence[float] | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    warmup_steps: float = 0
    warmup_ratio: float | None = None
    lr_scheduler_type: str = "linear"
    """`linear`, `constant` or `constant_with_warmup`."""
    entropy_coef: float = 0.0
    seed: int = 42
    bf16: bool = False
    """Use bfloat16 for weights and computation, with float32 master weights in the optimizer."""
    gradient_checkpointing: bool = True
    use_cpu: bool = False
    model_init_kwargs: dict[str, Any] | None = None
    """Arguments for loading the model: `dtype`, `attn_implementation`, `trust_remote_code`."""
    trust_remote_code: bool = False
    save_steps: float = 500
    save_total_limit: int | None = None
    eval_strategy: str = "no"
    eval_steps: float | None = None
    """Number of updates between evaluations; None means `logging_steps`, as in transformers."""
    logging_steps: float = 10
    """Used only as the default of `eval_steps`. Every iteration is logged."""
    report_to: str | Sequence[str] = "none"
    optim: str = "adamw_torch_fused"
    """Any name that contains `adamw`. All of them select the same AdamW, which is the only optimizer."""
    top_p: float = 1.0
    top_k: int | None = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    use_vllm: bool = False
    loss_type: str | None = "dapo"
    mask_truncated_completions: bool = False
    importance_sampling_level: str = "token"
    sync_ref_model: bool = False
    delta: float | None = None
    top_entropy_quantile: float = 1.0
    fp16: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _FIXED.items():
            value = getattr(self, name)
            # The value of a field may be a member of an enumeration of transformers, whose `value` is the text.
            if getattr(value, "value", value) not in allowed:
                raise UserError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))} (docs/from-trl.md)")
        if "adamw" not in str(getattr(self.optim, "value", self.optim)):
            raise UserError(f"optim is {self.optim!r}; allowed: 'adamw_torch_fused' (AdamW is the only optimizer)")
        if any(key.startswith("model.") for key in self.settings):
            raise UserError(
                "settings has a key of the section model; pass the model to VinePPOTrainer (peft_config adds adapters)"
            )
        self._check_batches()

    def _check_batches(self) -> None:
        """Check that an iteration consists of whole groups and has enough responses for at least one update."""
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "num_iterations")
        for name in (*counts, "steps_per_generation", "generation_batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.rollouts_per_iteration % self.num_generations:
            raise UserError(
                f"a generation batch has {self.rollouts_per_iteration} responses (per_device_train_batch_size x "
                f"steps_per_generation), which is not a multiple of num_generations {self.num_generations}"
            )
        if self.rollouts_per_iteration < self.minibatch_size:
            raise UserError(
                f"an update takes {self.minibatch_size} responses (per_device_train_batch_size x "
                f"gradient_accumulation_steps), but a generation batch has {self.rollouts_per_iteration}; increase "
                "steps_per_generation, or generation_batch_size if it is set"
            )

    def __getattr__(self, name: str) -> Any:
        """Return the default value of a field of TRL or transformers. Python calls this if the field was not set."""
        if not name.startswith("_"):
            for table in (_WITHOUT_EFFECT, _NEUTRAL, _transformers_defaults()):
                if name in table:
                    return table[name]
        raise AttributeError(f"VinePPOConfig has no field {name}")

    @property
    def minibatch_size(self) -> int:
        """Number of rollouts per update."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rollouts_per_iteration(self) -> int:
        """Number of responses that are sampled in each iteration, before its updates."""
        if self.generation_batch_size is not None:
            return self.generation_batch_size
        return self.per_device_train_batch_size * (self.steps_per_generation or self.gradient_accumulation_steps)

    def to_config(self, num_train: int, num_eval: int = 0) -> Config:
        """Convert to the settings of `vineppo train`.

        The section `model` of the result has its default values, because the trainer replaces it.

        Args:
            num_train: number of training problems.
            num_eval: number of evaluation problems.
        Raises:
            UserError: if a setting is unknown or has a value that is not allowed.
        """
        refuse_settings_of_other_algorithms(find_algorithm(self.algorithm), self.settings, "in settings")
        num_problems = self.rollouts_per_iteration // self.num_generations
        per_iteration = self.num_iterations * -(-self.rollouts_per_iteration // self.minibatch_size)
        iterations = max(1, round(self.num_train_epochs * num_train / num_problems))
        if self.max_steps > 0:
            iterations = -(-self.max_steps // per_iteration)
        updates = min(iterations * per_iteration, self.max_steps if self.max_steps > 0 else 1 << 62)
        warmup = self.warmup_steps if self.warmup_ratio is None else self.warmup_ratio
        values = {
            "rollouts.num_problems": num_problems,
            "learner.minibatch_size": self.minibatch_size,
            "learner.warmup_updates": _num_updates(warmup, updates),
            "run.iterations": iterations,
            "run.max_updates": max(0, self.max_steps),
            "run.checkpoint_every": max(1, -(-_num_updates(self.save_steps, updates) // per_iteration)),
        }
        epoch = per_iteration * max(1, num_train // num_problems)
        evaluation = self._evaluation(num_eval, updates, per_iteration, epoch)
        return config_from_dict(
            Config, {**self._renamed(), **values, **evaluation, **self.settings}, "in VinePPOConfig"
        )

    def _evaluation(self, num_eval: int, updates: int, per_iteration: int, epoch: int) -> dict[str, Any]:
        """Return the settings of the section `eval`, as dotted key -> value.

        As in TRL, the evaluation uses all rows, and samples in the same way as training. The model is evaluated before
        and after training, and as often as `eval_strategy` and `eval_steps` determine.

        Args:
            num_eval: number of evaluation problems.
            updates: number of updates of the run.
            per_iteration: number of updates per iteration.
            epoch: number of updates in one pass over the training problems.
        """
        strategy = str(getattr(self.eval_strategy, "value", self.eval_strategy))
        samples = self.num_generations_eval or self.num_generations
        like_training = {"eval.num_samples": samples, "eval.temperature": self.temperature}
        if strategy == "no" or not num_eval:
            return {"eval.every": 0, "eval.final_num_problems": 0, **like_training}
        steps = epoch if strategy == "epoch" else _num_updates(self.eval_steps or self.logging_steps, updates)
        return {
            "eval.every": max(1, -(-steps // per_iteration)),
            "eval.num_problems": num_eval,
            "eval.final_num_problems": num_eval,
            **like_training,
        }

    def _renamed(self) -> dict[str, Any]:
        """Return the settings of `Config` that have a constant value or depend on one or two fields of this class.

        The result maps dotted keys of `Config` to values. The constants make a run behave as in TRL.
        """
        return {
            "algorithm": self.algorithm,
            "task.name": "dataset",
            "task.grading.truncated": True,
            "task.reward_weights": list(self.reward_weights or ()),
            "rollouts.group_size": self.num_generations,
            "rollouts.temperature": self.temperature,
            "rollouts.max_new_tokens": self.max_completion_length,
            **self._algorithm_fields(),
            "learner.lr": self.learning_rate,
            "learner.epochs": self.num_iterations,
            "learner.clip_low": self.epsilon,
            "learner.clip_high": self.epsilon if self.epsilon_high is None else self.epsilon_high,
            "learner.kl.coefficient": self.beta,
            "learner.kl.reduction": "token_mean",
            "learner.kl.importance_weighted": self.use_bias_correction_kl,
            "learner.decay": self._decay(),
            "learner.weight_decay": self.weight_decay,
            "learner.betas": [self.adam_beta1, self.adam_beta2],
            "learner.max_grad_norm": self.max_grad_norm,
            "learner.entropy_coefficient": self.entropy_coef,
            "run.dir": self.output_dir,
            "run.seed": self.seed,
            "run.keep_checkpoints": self.save_total_limit or 1,
            "run.report_to": self._trackers(),
        }

    def _algorithm_fields(self) -> dict[str, Any]:
        """Return the settings of the selected algorithm that depend on fields of this class, as dotted key -> value."""
        algorithm = find_algorithm(self.algorithm)
        fields = {
            "num_mc_rollouts": self.num_mc_rollouts,
            "splitter": self.splitter,
            "value_lr": self.learning_rate,
            "scale_by_std": self.scale_rewards in (True, "group"),
        }
        known = algorithm.settings.model_fields
        return {f"{algorithm.name}.{name}": value for name, value in fields.items() if name in known}

    def _decay(self) -> str:
        """Return the value of `learner.decay` that corresponds to `lr_scheduler_type`."""
        decays = {"linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
        name = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        if name not in decays:
            raise UserError(f"lr_scheduler_type is {name!r}; allowed: {', '.join(decays)}")
        return decays[name]

    def _trackers(self) -> list[str]:
        """Return the value of `run.report_to`. `none` and `all` are left out, so both mean no tracker."""
        names = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)
        return [name for name in names if name not in ("none", "all")]


def _num_updates(steps: float, updates: int) -> int:
    """Convert a number of steps, as in transformers, to a number of updates.

    Args:
        steps: a number of updates, or a fraction of all updates if it is below 1.
        updates: number of updates of the run.
    """
    return round(steps * updates) if steps < 1 else int(steps)


@functools.cache
def _transformers_defaults() -> Mapping[str, Any]:
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


def _checked_init(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap `VinePPOConfig.__init__` so that it also accepts fields of GRPOConfig which the class does not define.

    `_check_other_field` checks these fields. They become attributes of the object.
    """

    @functools.wraps(init)
    def checked(self: VinePPOConfig, *args: Any, **kwargs: Any) -> None:
        known = {f.name for f in dataclasses.fields(VinePPOConfig)}
        other_fields = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        for name, value in other_fields.items():
            _check_other_field(name, value, known)
        init(self, *args, **kwargs)
        for name, value in other_fields.items():
            setattr(self, name, value)

    return checked


def _check_other_field(name: str, value: Any, known: set[str]) -> None:
    """Check a field of GRPOConfig that VinePPOConfig does not define.

    Args:
        name: name of the field.
        value: value of the field.
        known: names of the fields of VinePPOConfig, for the hint in the message.
    Raises:
        UserError: if TRL has no field with this name, or if the value requires a feature that is not supported.
    """
    if name in _WITHOUT_EFFECT or name in _WITHOUT_EFFECT_OF_TRANSFORMERS:
        return
    neutral = {**_transformers_defaults(), **_NEUTRAL}
    if name in neutral:
        if value == neutral[name] or name.startswith(_WITHOUT_EFFECT_BEGINNINGS):
            return
        raise UserError(f"{name} is {value!r}, which is not supported; allowed: {neutral[name]!r}")
    if not name.startswith(_WITHOUT_EFFECT_BEGINNINGS):
        hint = did_you_mean(name, known) or "docs/from-trl.md lists the fields"
        raise UserError(f"VinePPOConfig has no field {name}; {hint}")


VinePPOConfig.__init__ = _checked_init(VinePPOConfig.__init__)  # type: ignore[method-assign]
