"""An interface that TRL users know: `VinePPOTrainer` and `VinePPOConfig` in the place of GRPO's.

    from vineppo import VinePPOConfig, VinePPOTrainer

    trainer = VinePPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=reward,
        args=VinePPOConfig(output_dir="out", num_generations=8),
        train_dataset=dataset,
    )
    trainer.train()

Below it is the same training as `vineppo train`: `to_config` shows which settings it runs. docs/from-trl.md has the
table of names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vineppo.config import Config
from vineppo.evaluate import measure
from vineppo.policy import Policy, load_pretrained
from vineppo.rollouts import problem_range
from vineppo.sampling.native import NativeSampler
from vineppo.settings import config_from_dict, did_you_mean
from vineppo.tasks import build_task
from vineppo.tasks.graders import load_grader
from vineppo.tasks.rows import as_sequence
from vineppo.train import Given, resume, total_updates, train
from vineppo.trl_names import with_trl_names
from vineppo.types import Split, UserError

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
"""TRL's fields that have one meaning here."""
_WITHOUT_EFFECT = (
    "log_completions",
    "num_completions_to_print",
    "remove_unused_columns",
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
    "run_name",
    "dataloader_num_workers",
    "dataloader_drop_last",
    "disable_dropout",
    "shuffle_dataset",
    "optim",
    "save_strategy",
    "save_only_model",
    "ds3_gather_for_generation",
    "max_prompt_length",
    "per_device_eval_batch_size",
    "num_generations_eval",
    "do_train",
    "do_eval",
    "tf32",
    "label_names",
)
"""TRL's fields that are accepted and change nothing: what they are about is always done, or never."""


@dataclass
class VinePPOConfig:
    """Settings under TRL's names, with TRL's defaults where GRPOConfig has the field; the first ones are ours.

    A field that TRL has and we cannot honour is refused unless it holds its neutral value.
    """

    output_dir: str = "vineppo-output"
    """Run directory."""
    algorithm: str = "vineppo"
    """`vineppo`, `ppo`, `grpo`, `rloo` or `reinforce`."""
    num_mc_rollouts: int = 9
    """K: continuations sampled from each intermediate state."""
    splitter: str = "newline"
    """How a response is cut into steps (`vineppo.splitter`)."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Any further setting of `vineppo train` by its dotted key, such as `{"vineppo.alternatives": True}`; wins."""
    learning_rate: float = 1e-6
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    num_generations: int = 8
    """G: responses to a prompt. 1 is possible for vineppo and ppo."""
    max_completion_length: int = 256
    num_train_epochs: float = 3.0
    max_steps: int = -1
    """Optimizer updates; -1: as many as `num_train_epochs` need."""
    num_iterations: int = 1
    """Passes over each batch of rollouts."""
    temperature: float = 1.0
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    scale_rewards: str | bool = "group"
    """`group` or True: GRPO divides by the group's standard deviation; `none` or False: it does not."""
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
    """Weights and computation in bfloat16, with float32 masters in the optimizer."""
    gradient_checkpointing: bool = False
    use_cpu: bool = False
    model_init_kwargs: dict[str, Any] | None = None
    """`dtype`, `attn_implementation`, `trust_remote_code`."""
    trust_remote_code: bool = False
    save_steps: float = 500
    save_total_limit: int | None = None
    eval_strategy: str = "no"
    eval_steps: float | None = None
    report_to: str | Sequence[str] = "none"
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
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}; allowed here: {allowed[0]!r} (docs/from-trl.md says why)"
                )
        if self.rollouts_per_iteration % self.num_generations:
            raise UserError(
                f"a generation batch has {self.rollouts_per_iteration} responses (per_device_train_batch_size x "
                f"steps_per_generation), which is no multiple of num_generations {self.num_generations}"
            )

    @property
    def minibatch_size(self) -> int:
        """Rollouts per update."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rollouts_per_iteration(self) -> int:
        """Responses that are sampled before updates begin."""
        if self.generation_batch_size is not None:
            return self.generation_batch_size
        return self.per_device_train_batch_size * (self.steps_per_generation or self.gradient_accumulation_steps)

    def to_config(self, num_train: int, evaluate: bool) -> Config:
        """What `vineppo train` would be told.

        Args:
            num_train: number of training problems.
            evaluate: whether there are problems to evaluate on.
        """
        num_problems = self.rollouts_per_iteration // self.num_generations
        minibatch = min(self.minibatch_size, self.rollouts_per_iteration)
        per_iteration = self.num_iterations * -(-self.rollouts_per_iteration // minibatch)
        iterations = max(1, round(self.num_train_epochs * num_train / num_problems))
        if self.max_steps > 0:
            iterations = -(-self.max_steps // per_iteration)
        updates = min(iterations * per_iteration, self.max_steps if self.max_steps > 0 else 1 << 62)
        epoch = per_iteration * max(1, num_train // num_problems)
        every = {"no": 0, "epoch": epoch, "steps": _share(self.eval_steps or self.save_steps, updates)}
        warmup = self.warmup_steps if self.warmup_ratio is None else self.warmup_ratio
        values = {
            "rollouts.num_problems": num_problems,
            "learner.minibatch_size": minibatch,
            "learner.warmup_updates": _share(warmup, updates),
            "eval.every": -(-every[self.eval_strategy] // per_iteration) if evaluate else 0,
            "eval.final_num_problems": 256 if evaluate else 0,
            "run.iterations": iterations,
            "run.max_updates": max(0, self.max_steps),
            "run.checkpoint_every": max(1, -(-_share(self.save_steps, updates) // per_iteration)),
        }
        return config_from_dict(Config, {**self._renamed(), **values, **self.settings}, "in VinePPOConfig")

    def _renamed(self) -> dict[str, Any]:
        """What needs no more than another name."""
        return {
            "algorithm": self.algorithm,
            "task.name": "dataset",
            "task.grading.truncated": True,
            "task.reward_weights": list(self.reward_weights or ()),
            "rollouts.group_size": self.num_generations,
            "rollouts.temperature": self.temperature,
            "rollouts.max_new_tokens": self.max_completion_length,
            "vineppo.num_mc_rollouts": self.num_mc_rollouts,
            "vineppo.splitter": self.splitter,
            "ppo.value_lr": self.learning_rate,
            "grpo.scale_by_std": self.scale_rewards in (True, "group"),
            "learner.lr": self.learning_rate,
            "learner.epochs": self.num_iterations,
            "learner.clip_low": self.epsilon,
            "learner.clip_high": self.epsilon if self.epsilon_high is None else self.epsilon_high,
            "learner.kl.coefficient": self.beta,
            "learner.kl.reduction": "token_mean",
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

    def _decay(self) -> str:
        decays = {"linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
        name = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        if name not in decays:
            raise UserError(f"lr_scheduler_type is {name!r}; allowed: {', '.join(decays)}")
        return decays[name]

    def _trackers(self) -> list[str]:
        chosen = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)
        return [name for name in chosen if name not in ("none", "all")]


def _share(steps: float, updates: int) -> int:
    """A number of updates, which below 1 is a share of all of them, as in transformers."""
    return round(steps * updates) if steps < 1 else int(steps)


def _checked_init(init: Callable[..., None]) -> Callable[..., None]:
    """Fields without effect are dropped, unknown ones refused with the nearest known one."""

    @functools.wraps(init)
    def checked(self: VinePPOConfig, *args: Any, **kwargs: Any) -> None:
        known = [own.name for own in dataclasses.fields(VinePPOConfig)]
        for name in [name for name in kwargs if name in _WITHOUT_EFFECT]:
            del kwargs[name]
        for name in kwargs:
            if name not in known:
                hint = did_you_mean(name, known) or "docs/from-trl.md lists what there is"
                raise UserError(f"VinePPOConfig has no field {name}; {hint}")
        init(self, *args, **kwargs)

    return checked


VinePPOConfig.__init__ = _checked_init(VinePPOConfig.__init__)  # type: ignore[method-assign]


class TrainOutput(NamedTuple):
    """What `VinePPOTrainer.train` returns; the names are those of transformers."""

    global_step: int
    """Updates."""
    training_loss: float
    """Mean policy loss over the run; of a clipped objective, so it says little."""
    metrics: dict[str, Any]
    """summary.json."""


class VinePPOTrainer:
    """Trains a model by reinforcement learning on verifiable rewards, with credit for every step.

    Args:
        model: path, hub id, a transformers causal language model, or a peft model around one; trained in place.
        reward_funcs: fn(prompts, completions, completion_ids, **columns) -> one number or None per completion, also
            asynchronous; the name of one of ours (`hash`, `boxed`, `exact`) or `module:function`; or a list of those.
            Functions are called in this process; names alone run in processes of their own, with limits.
        args: settings.
        train_dataset: rows with a `prompt` (text, or messages) and any further columns.
        eval_dataset: rows to measure the mean reward on, before, after, and as `eval_strategy` says.
        processing_class: the tokenizer; needed with a model that is no path, unless its configuration names one.
        callbacks: transformers' `TrainerCallback` objects or classes.
        peft_config: a `peft.LoraConfig`; the adapters are trained in the place of the weights.
    Raises:
        UserError: for what cannot work.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: VinePPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
        peft_config: Any = None,
    ):
        self.args = args or VinePPOConfig()
        self.reward_funcs = _reward_functions(reward_funcs)
        self.train_dataset, self.eval_dataset = _rows("train_dataset", train_dataset), eval_dataset
        self.policy = _policy(model, processing_class, peft_config, self.args)
        self.model, self.processing_class = self.policy.adapters or self.policy.model, self.policy.tokenizer
        self.config = self.args.to_config(len(self.train_dataset), eval_dataset is not None)
        if all(isinstance(function, str) for function in self.reward_funcs):
            # Named ones run in processes of their own, where they can be stopped.
            names, self.reward_funcs = tuple(self.reward_funcs), []
            self.config = replace(self.config, task=replace(self.config.task, rewards=names))
        self.reward_funcs = [load_grader(own) if isinstance(own, str) else own for own in self.reward_funcs]
        self._listener = _Listener(self, [one() if isinstance(one, type) else one for one in callbacks or ()])
        self.state = self._listener.state

    def train(self, resume_from_checkpoint: bool = False) -> TrainOutput:
        """Train; with `resume_from_checkpoint`, go on with the run in `output_dir`, to the same bit on a CPU."""
        tables: dict[Split, Any] = {"train": self.train_dataset}
        if self.eval_dataset is not None:
            tables["validation"] = _rows("eval_dataset", self.eval_dataset)
        start = resume if resume_from_checkpoint else train
        summary = start(
            self.config,
            recipe="trainer",
            reward_fn=self.reward_funcs,
            reporter=self._listener,
            given=Given(self.policy, tables),
        )
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        return TrainOutput(summary["updates"], sum(losses) / max(1, len(losses)), summary)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Mean reward on rows, `eval_dataset` if none are given, as `eval_reward`, with its 95% interval."""
        rows = _rows("eval_dataset", self.eval_dataset if eval_dataset is None else eval_dataset)
        task = build_task(self.config.task, self.policy.chat_prompt, self.reward_funcs, {"validation": rows})
        measured = measure(
            self.policy,
            NativeSampler(self.policy, temperature=self.config.eval.temperature),
            task,
            problem_range(task, "validation", len(rows)),
            num_samples=self.config.eval.num_samples,
            max_new_tokens=self.config.rollouts.max_new_tokens,
            address=(self.config.run.seed, "evaluate"),
        )
        interval = measured.mean_reward(self.config.run.seed)
        return {"eval_reward": interval.mean, "eval_reward_low": interval.low, "eval_reward_high": interval.high}

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the model (merged with its adapters, which lie in `adapter` as well) and the tokenizer."""
        self.policy.save(output_dir or Path(self.args.output_dir) / "final")


class _Listener:
    """Tells transformers' callbacks how a run goes; implements `train.Reporter`."""

    def __init__(self, trainer: VinePPOTrainer, callbacks: Sequence[Any]):
        from transformers import TrainerControl, TrainerState

        self.trainer, self.callbacks = trainer, list(callbacks)
        self.state, self.control = TrainerState(), TrainerControl()

    def start(self, config: Config, total_iterations: int) -> None:
        """on_train_begin."""
        self.state.max_steps = total_updates(config)
        self._tell("on_train_begin")

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """on_step_end, on_evaluate and on_log, in this order; a step is an iteration here."""
        logs = with_trl_names(metrics)
        self.state.global_step = int(metrics.get("updates") or 0)
        logs["step"] = self.state.global_step
        problems = self.trainer.config.rollouts.num_problems * metrics["iteration"]
        self.state.epoch = logs["epoch"] = problems / len(self.trainer.train_dataset)
        self.state.log_history.append(logs)
        if metrics["iteration"]:
            self._tell("on_step_end")
        if "eval/accuracy" in metrics:
            self._tell("on_evaluate", metrics=logs)
        self._tell("on_log", logs=logs)
        print(json.dumps({key: logs[key] for key in ("iteration", "reward", "eval_reward") if key in logs}), flush=True)

    def wants_to_stop(self) -> bool:
        """Whether a callback has set `control.should_training_stop`."""
        return bool(self.control.should_training_stop)

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """on_train_end."""
        self._tell("on_train_end")

    def _tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                changed = method(self.trainer.args, self.state, self.control, model=self.trainer.model, **more)
                self.control = self.control if changed is None else changed  # transformers allows either way


def _reward_functions(given: Any) -> list[Any]:
    functions = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    if not functions:
        raise UserError("reward_funcs is empty; give a function fn(prompts, completions, **columns) -> list of numbers")
    for function in functions:
        if not isinstance(function, str) and (isinstance(function, torch.nn.Module) or not callable(function)):
            raise UserError(
                f"reward_funcs has a {type(function).__name__}; allowed: functions, and names of ours (hash, boxed, "
                "exact); a reward model can be called in a function of yours"
            )
    return functions


def _rows(name: str, dataset: Any) -> Any:
    if dataset is None:
        raise UserError(f"{name} is missing; give rows with a column prompt")
    rows = as_sequence(dataset)
    if not len(rows):
        raise UserError(f"{name} is empty; give rows with a column prompt")
    return rows


def _policy(model: Any, processing_class: Any, peft_config: Any, args: VinePPOConfig) -> Policy:
    """The model as a policy, with fresh adapters where they are asked for."""
    if isinstance(model, str | Path):
        model, own = _loaded(str(model), args)
        tokenizer = processing_class or own
    else:
        tokenizer = processing_class or _tokenizer_of(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        if peft_config is not None:
            raise UserError("model has adapters already, and peft_config asks for more; give one of them")
        return Policy(model.get_base_model(), tokenizer, model)
    if peft_config is None:
        return Policy(model, tokenizer)
    import peft  # which made peft_config

    return Policy(model, tokenizer, peft.get_peft_model(model, peft_config))


def _loaded(path: str, args: VinePPOConfig) -> tuple[Any, Any]:
    init = dict(args.model_init_kwargs or {})
    dtype = init.pop("dtype", init.pop("torch_dtype", None)) or ("bfloat16" if args.bf16 else "float32")
    values = {
        "path": path,
        "dtype": str(dtype).removeprefix("torch.").replace("auto", "float32"),
        "device": "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu",
        "gradient_checkpointing": args.gradient_checkpointing,
        "trust_remote_code": init.pop("trust_remote_code", args.trust_remote_code),
        "attn_implementation": init.pop("attn_implementation", ""),
    }
    if init:
        raise UserError(
            f"model_init_kwargs has {', '.join(init)}; allowed: dtype, attn_implementation, trust_remote_code; for the "
            "others give the model itself"
        )
    return load_pretrained(config_from_dict(Config, {f"model.{k}": v for k, v in values.items()}, "in args").model)


def _tokenizer_of(model: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.config._name_or_path)
    except (OSError, ValueError) as error:
        raise UserError("processing_class is missing: give the model's tokenizer") from error
