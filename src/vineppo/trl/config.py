"""Define `VinePPOConfig`, the settings of `VinePPOTrainer`, with the field names and defaults of TRL's GRPOConfig.

`VinePPOConfig.to_config` converts them to `vineppo.config.schema.Config`, the settings of `vineppo train`.
docs/from-trl.md lists for each field the corresponding setting of `vineppo train`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.training.configure import config_from_dict, refuse_settings_of_other_algorithms
from vineppo.trl.fields import (
    FIXED,
    INSTEAD,
    NEUTRAL,
    WITHOUT_EFFECT,
    check_other_field,
    transformers_defaults,
)
from vineppo.trl.names import FieldNames
from vineppo.types import UserError

_REDUCTIONS = {
    None: "token_mean",
    "dapo": "token_mean",
    "bnpo": "token_mean",
    "grpo": "sequence_mean",
    "dr_grpo": "constant",
}
"""`loss_type` -> `learner.reduction`."""
_DECAYS = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
"""`lr_scheduler_type` -> `learner.decay`."""
_FIELD_OF_ALGORITHMS = {
    "num_mc_rollouts": "num_mc_rollouts",
    "splitter": "splitter",
    "value_lr": "learning_rate",
    "scale_by_std": "scale_rewards",
}
"""Setting in the section of an algorithm -> the field that determines it, if the algorithm has the setting."""


class _Plan(NamedTuple):
    """Numbers of a run that follow from the batch sizes, `max_steps` and `num_train_epochs`."""

    num_problems: int
    """Number of problems per iteration."""
    iterations: int
    per_iteration: int
    """Number of updates per iteration."""
    updates: int
    """Number of updates of the run."""
    epoch: int
    """Number of updates in one pass over the training problems."""


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
    """Algorithm that computes the credit: `vineppo`, `counterfactual`, `ppo`, `grpo`, `grpo_lambda`, `rloo`,
    `reinforce`, `tree`, `tempo`, `spo_chain`, or `module:object` for a user-defined algorithm."""
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
    """G: number of responses per prompt. `grpo`, `grpo_lambda`, `rloo` and `tempo` require at least 2, and `tree` a
    multiple of the product of `tree.branches`."""
    num_generations_eval: int | None = None
    """Number of responses to each prompt of `eval_dataset`; None means `num_generations`."""
    max_completion_length: int = 512
    chat_template_kwargs: dict[str, Any] | None = None
    """Values of variables of the chat template, such as `{"enable_thinking": False}`."""
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
    """For `grpo`, `grpo_lambda` and `tempo`: `group` or True divides advantages by the standard deviation of the
    rewards of the group; `none` or False does not divide."""
    reward_weights: Sequence[float] | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    warmup_steps: float = 0
    warmup_ratio: float | None = None
    lr_scheduler_type: str = "linear"
    """`linear`, `cosine`, `constant` or `constant_with_warmup`."""
    entropy_coef: float = 0.0
    seed: int = 42
    bf16: bool = False
    """Use bfloat16 for weights and computation, with float32 master weights in the optimizer."""
    gradient_checkpointing: bool = True
    use_cpu: bool = False
    model_init_kwargs: dict[str, Any] | None = None
    """Arguments for loading the model: `dtype`, `attn_implementation`, `trust_remote_code`."""
    trust_remote_code: bool = False
    save_strategy: str = "steps"
    """When checkpoints are saved, in addition to those at the start and at the end: `steps` (every `save_steps`
    updates), `epoch`, or `no`."""
    save_steps: float = 500
    save_total_limit: int | None = None
    eval_strategy: str = "no"
    eval_steps: float | None = None
    """Number of updates between evaluations; None means `logging_steps`, as in transformers."""
    logging_strategy: str = "steps"
    """When callbacks and `state.log_history` get metrics: `steps` (every `logging_steps` updates), `epoch`, or `no`.
    metrics.jsonl and trackers get every iteration."""
    logging_steps: float = 10
    """Number of updates between logs; also the default of `eval_steps`. Logs contain means since the last log."""
    logging_first_step: bool = False
    report_to: str | Sequence[str] = "none"
    optim: str = "adamw_torch_fused"
    """Any name that contains `adamw`. All of them select the same AdamW, which is the only optimizer."""
    top_p: float = 1.0
    top_k: int | None = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    use_vllm: bool = False
    loss_type: str | None = "dapo"
    """How the loss of an update is reduced: `dapo` and `bnpo`: mean over all tokens; `grpo`: mean over the tokens of
    each response, then over responses; `dr_grpo`: sum over all tokens, divided by the number of responses times
    `max_completion_length`. None means `dapo`."""
    mask_truncated_completions: bool = False
    """Leave responses that reached `max_completion_length` out of the loss."""
    importance_sampling_level: str = "token"
    sync_ref_model: bool = False
    delta: float | None = None
    top_entropy_quantile: float = 1.0
    fp16: bool = False

    def __post_init__(self) -> None:
        for name, allowed in FIXED.items():
            value = getattr(self, name)
            # The value of a field may be a member of an enumeration of transformers, whose `value` is the text.
            if getattr(value, "value", value) not in allowed:
                choices = ", ".join(map(repr, allowed)) + INSTEAD.get(name, "")
                raise UserError(f"{name} is {value!r}; allowed: {choices} (docs/from-trl.md)")
        if "adamw" not in str(getattr(self.optim, "value", self.optim)):
            raise UserError(f"optim is {self.optim!r}; allowed: 'adamw_torch_fused' (AdamW is the only optimizer)")
        if not isinstance(self.settings, Mapping):
            raise UserError(
                f"settings is {self.settings!r}; it must be a dictionary from dotted keys to values, such as "
                '{"vineppo.alternatives": True}'
            )
        if any(str(key).startswith("model.") for key in self.settings):
            raise UserError(
                "settings has a key of the section model; pass the model to VinePPOTrainer (peft_config adds adapters)"
            )
        self._check_numbers()
        self._check_batches()

    def _check_numbers(self) -> None:
        """Check the counts and intervals that `to_config` calculates with, before `Config` checks the other fields."""
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "num_iterations")
        optional_counts = ("steps_per_generation", "generation_batch_size", "num_generations_eval", "save_total_limit")
        for name in (*counts, *optional_counts):
            value = getattr(self, name)
            if not ((_is_number(value, whole=True) and value >= 1) or (value is None and name in optional_counts)):
                raise UserError(f"{name} is {value!r}; it must be at least 1, and a whole number")
        if not _is_number(self.max_steps, whole=True):
            raise UserError(f"max_steps is {self.max_steps!r}; it must be a number of updates")
        if not (_is_number(self.warmup_steps) and self.warmup_steps >= 0):
            raise UserError(f"warmup_steps is {self.warmup_steps!r}; it must be a number of updates, at least 0")
        intervals = ["save_steps", "logging_steps"]
        intervals += ["num_train_epochs"] * (self.max_steps < 1) + ["eval_steps"] * (self.eval_steps is not None)
        for name in intervals:
            if not (_is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be a number above 0")
        if self.warmup_ratio is not None and not (_is_number(self.warmup_ratio) and 0 <= self.warmup_ratio <= 1):
            raise UserError(f"warmup_ratio is {self.warmup_ratio!r}; it must be a fraction of all updates, from 0 to 1")

    def _check_batches(self) -> None:
        """Check that an iteration consists of whole groups and has enough responses for at least one update."""
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
            for table in (WITHOUT_EFFECT, NEUTRAL, transformers_defaults()):
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
        with self.names.in_errors():
            refuse_settings_of_other_algorithms(find_algorithm(self.algorithm), self.settings, "in settings")
            plan = self._plan(num_train)
            values = {
                **self._renamed(),
                **self._lengths(plan),
                **self._evaluation(num_eval, plan),
                **self.settings,
            }
            return config_from_dict(Config, values, "in VinePPOConfig")

    @property
    def names(self) -> FieldNames:
        """Replaces the names of settings in messages by those of the fields of this object."""
        algorithm = find_algorithm(self.algorithm).name
        changed = {f"{algorithm}.{name}": field for name, field in _FIELD_OF_ALGORITHMS.items()}
        if self.epsilon_high is None:
            changed["learner.clip_high"] = "epsilon"
        if self.warmup_ratio is not None:
            changed["learner.warmup_updates"] = "warmup_ratio"
        if self.max_steps > 0:
            changed["run.iterations"] = "max_steps"
        if self.eval_steps is None:
            changed["eval.every"] = "logging_steps"
        return FieldNames(changed, self.settings)

    def logging_interval(self, num_train: int) -> int:
        """Return the number of updates between logs, or 0 if nothing is logged (`logging_strategy`).

        Args:
            num_train: number of training problems.
        """
        return self._interval(self.logging_strategy, self.logging_steps, self._plan(num_train))

    def _plan(self, num_train: int) -> _Plan:
        """Return the numbers of updates and iterations of a run on `num_train` problems."""
        num_problems = self.rollouts_per_iteration // self.num_generations
        per_iteration = self.num_iterations * -(-self.rollouts_per_iteration // self.minibatch_size)
        iterations = max(1, round(self.num_train_epochs * num_train / num_problems))
        if self.max_steps > 0:
            iterations = -(-self.max_steps // per_iteration)
        updates = min(iterations * per_iteration, self.max_steps if self.max_steps > 0 else 1 << 62)
        return _Plan(
            num_problems, iterations, per_iteration, updates, per_iteration * max(1, num_train // num_problems)
        )

    def _lengths(self, plan: _Plan) -> dict[str, Any]:
        """Return the settings that depend on the number of updates of the run, as dotted key -> value."""
        if self.warmup_ratio is None:
            warmup = _num_updates(self.warmup_steps, plan.updates)
        else:
            warmup = math.ceil(self.warmup_ratio * plan.updates)
        save = self._interval(self.save_strategy, self.save_steps, plan)
        return {
            "rollouts.num_problems": plan.num_problems,
            "learner.minibatch_size": self.minibatch_size,
            "learner.warmup_updates": warmup,
            "run.iterations": plan.iterations,
            "run.max_updates": max(0, self.max_steps),
            "run.checkpoint_every": -(-save // plan.per_iteration),
        }

    def _interval(self, strategy: Any, steps: float, plan: _Plan) -> int:
        """Return the number of updates between two logs, evaluations or checkpoints; 0 means never.

        Args:
            strategy: `no`, `steps` or `epoch`.
            steps: a number of updates, or a fraction of all updates if it is below 1. Used for `steps`.
        """
        strategy = getattr(strategy, "value", strategy)
        if strategy == "no":
            return 0
        return plan.epoch if strategy == "epoch" else max(1, _num_updates(steps, plan.updates))

    def _evaluation(self, num_eval: int, plan: _Plan) -> dict[str, Any]:
        """Return the settings of the section `eval`, as dotted key -> value.

        As in TRL, the evaluation uses all rows, and samples in the same way as training. The model is evaluated before
        and after training, and as often as `eval_strategy` and `eval_steps` determine.

        Args:
            num_eval: number of evaluation problems.
        """
        samples = self.num_generations_eval or self.num_generations
        like_training = {"eval.num_samples": samples, "eval.temperature": self.temperature}
        steps = self._interval(self.eval_strategy, self.eval_steps or self.logging_steps, plan)
        if not steps or not num_eval:
            return {"eval.every": 0, "eval.final_num_problems": 0, **like_training}
        return {
            "eval.every": -(-steps // plan.per_iteration),
            "eval.num_problems": num_eval,
            "eval.final_num_problems": num_eval,
            **like_training,
        }

    def _renamed(self) -> dict[str, Any]:
        """Return the settings of `Config` that have a constant value or depend on one or two fields of this class.

        The result maps dotted keys of `Config` to values. The constants make a run behave as in TRL.
        """
        reduction = _REDUCTIONS[self.loss_type]
        return {
            "algorithm": self.algorithm,
            "task.name": "dataset",
            "task.chat_template_kwargs": self.chat_template_kwargs or {},
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
            "learner.kl.reduction": "token_mean" if reduction == "token_mean" else "as_policy",
            "learner.kl.importance_weighted": self.use_bias_correction_kl,
            "learner.decay": _DECAYS[str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))],
            "learner.reduction": reduction,
            "learner.mask_truncated": self.mask_truncated_completions,
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
        fields = {name: getattr(self, field) for name, field in _FIELD_OF_ALGORITHMS.items()}
        fields["scale_by_std"] = self.scale_rewards in (True, "group")
        known = algorithm.settings.model_fields
        return {f"{algorithm.name}.{name}": value for name, value in fields.items() if name in known}

    def _trackers(self) -> list[str]:
        """Return the value of `run.report_to`. `none` and `all` are left out, so both mean no tracker."""
        names = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)
        return [name for name in names if name not in ("none", "all")]


def _is_number(value: Any, *, whole: bool = False) -> bool:
    """Return whether a value is a number, and not a boolean."""
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)


def _num_updates(steps: float, updates: int) -> int:
    """Convert a number of steps to a number of updates.

    Args:
        steps: a number of updates, or a fraction of all updates if it is below 1. As in transformers, the product is
            rounded up.
        updates: number of updates of the run.
    """
    return math.ceil(steps * updates) if steps < 1 else int(steps)


def _checked_init(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap `VinePPOConfig.__init__` so that it also accepts fields of GRPOConfig which the class does not define.

    `check_other_field` checks these fields. They become attributes of the object.
    """

    @functools.wraps(init)
    def checked(self: VinePPOConfig, *args: Any, **kwargs: Any) -> None:
        known = {f.name for f in dataclasses.fields(VinePPOConfig)}
        other_fields = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        for name, value in other_fields.items():
            check_other_field(name, value, known)
        init(self, *args, **kwargs)
        for name, value in other_fields.items():
            setattr(self, name, value)

    return checked


VinePPOConfig.__init__ = _checked_init(VinePPOConfig.__init__)  # type: ignore[method-assign]
