"""Define `VinePPOTrainer`, which trains a model with the interface of TRL's `GRPOTrainer`.

`VinePPOTrainer` and `VinePPOConfig` replace `GRPOTrainer` and `GRPOConfig` in a script:

    from vineppo import VinePPOConfig, VinePPOTrainer

    trainer = VinePPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=reward,
        args=VinePPOConfig(output_dir="out", num_generations=8),
        train_dataset=dataset,
    )
    trainer.train()

With `torchrun` or `accelerate launch`, the processes share the work (docs/scaling.md). The callbacks, the reward
functions and the files are those of the first process.

The trainer runs the same training as `vineppo train`, with the settings that `VinePPOConfig.to_config` returns.
docs/from-trl.md lists for each field of TRL the corresponding setting of vineppo.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vineppo.config.schema import Config, LoraConfig, ModelConfig
from vineppo.config.settings import replace
from vineppo.learning.sharding import use_own_gpu
from vineppo.model.adapters import check_new_adapters
from vineppo.model.codec import Codec
from vineppo.model.loading import load_pretrained
from vineppo.model.modes import with_checkpointing
from vineppo.model.policy import Policy
from vineppo.objects import message_line
from vineppo.run.peers import launched_ranks, require_launcher
from vineppo.sampling.wrapped import close
from vineppo.statistics import Interval
from vineppo.tasks import build_task
from vineppo.tasks.grading.graders import load_grader
from vineppo.training.configure import config_from_dict
from vineppo.training.evaluate import measure
from vineppo.training.loop import resume, train
from vineppo.training.parts import InMemory, build_engine, total_updates, updates_per_iteration
from vineppo.training.rollouts import problem_range
from vineppo.trl.arguments import (
    check_config,
    check_evaluation,
    check_model,
    check_object_settings,
    checked_callbacks,
    checked_rows,
    reward_functions,
)
from vineppo.trl.callbacks import Listener, Schedule
from vineppo.trl.config import VinePPOConfig
from vineppo.types import Split, UserError
from vineppo.view.trained import report_finished

__all__ = ["TrainOutput", "VinePPOConfig", "VinePPOTrainer"]


class TrainOutput(NamedTuple):
    """The result of `VinePPOTrainer.train`. The fields have the same names as in transformers."""

    global_step: int
    """Number of updates."""
    training_loss: float
    """Mean of the policy's loss (`policy/objective`) over the iterations. The loss does not show whether the policy has
    improved. With several processes, it is 0 in all but the first."""
    metrics: dict[str, Any]
    """The content of summary.json in the run directory: accuracies, numbers of tokens and updates, seconds."""


class VinePPOTrainer:
    """Trains a language model by reinforcement learning on verifiable rewards.

    Args:
        model: a path, a Hugging Face Hub id, a causal language model of transformers, or a peft model that contains
            one. A model object is trained in place.
        reward_funcs: a reward function, the name of a grader (`hash`, `boxed`, `exact` or `module:function`), or a list
            of functions and names. A reward function fn(prompts, completions, completion_ids, **columns) returns one
            number or None per completion, and can be asynchronous. Functions are called in this process. As in TRL,
            they also get the arguments `trainer_state` and `log_metric`, a function of (name, value), if their
            signature has these parameters. If `reward_funcs` contains only names, `boxed` and `module:function` run in
            separate processes with limits on time and memory.
        args: the settings; None means `VinePPOConfig()`.
        train_dataset: rows with a column `prompt` (text or messages). Further columns are passed to the reward
            functions.
        eval_dataset: rows for measuring the mean reward before and after training, and as often as
            `args.eval_strategy` determines. If `args.eval_strategy` is "no", only `evaluate()` uses the rows.
        processing_class: the tokenizer. It is required if `model` is an object and its tokenizer cannot be loaded from
            the path in its configuration.
        callbacks: `TrainerCallback` objects or classes of transformers. docs/from-trl.md lists the methods that are
            called.
        peft_config: a `peft.LoraConfig`. If it is given, adapters are added to the model and trained instead of the
            weights of the model.
    Raises:
        UserError: if an argument is missing or not supported.
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
        require_launcher()
        check_config(args)
        self.args = args or VinePPOConfig()
        self.reward_funcs: list[Any] = []
        callbacks = checked_callbacks(callbacks)
        with self.args.names.in_errors():
            self._build(
                model, reward_functions(reward_funcs), train_dataset, eval_dataset, processing_class, peft_config
            )
        objects = {"model": self.model, "processing_class": self.processing_class}
        self._listener = Listener(callbacks, self.args, objects, self._schedule)
        self.state = self._listener.state
        more = {"trainer_state": self.state, "log_metric": self._listener.note, "log_extra": _ignore}
        self.reward_funcs = [_with_extra_arguments(reward, more) for reward in self.reward_funcs]
        self._train_called = False
        self._listener.call("on_init_end")

    def _build(
        self,
        model: Any,
        reward_funcs: list[Any],
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        peft_config: Any,
    ) -> None:
        """Set the policy, the data, the reward functions and the configuration from the arguments of the trainer."""
        self.train_dataset = checked_rows("train_dataset", train_dataset)
        self.eval_dataset = None if eval_dataset is None else checked_rows("eval_dataset", eval_dataset)
        check_evaluation(eval_dataset, self.args)
        check_model(model, processing_class, peft_config)
        check_object_settings(model, self.args)
        num_eval = 0 if self.eval_dataset is None else len(self.eval_dataset)
        config = self.args.to_config(len(self.train_dataset), num_eval)
        self.policy = _policy(model, processing_class, peft_config, self.args)
        self.model, self.processing_class = self.policy.adapters or self.policy.model, self.policy.codec.tokenizer
        self.config = replace(config, model=_model_config(self.policy, self.args))
        if all(isinstance(function, str) for function in reward_funcs):
            # With `task.rewards`, `build_task` runs slow graders in separate processes, which can be stopped if they
            # exceed the time limit.
            self.config = replace(self.config, task=replace(self.config.task, rewards=tuple(reward_funcs)))
            reward_funcs = []
        self.reward_funcs = [load_grader(reward) if isinstance(reward, str) else reward for reward in reward_funcs]

    def _schedule(self) -> Schedule:
        """Return the planned numbers of the run, for the callbacks."""
        return Schedule(
            max_steps=total_updates(self.config),
            updates_per_iteration=updates_per_iteration(self.config),
            logging_interval=self.args.logging_interval(len(self.train_dataset)),
            epochs_per_iteration=self.config.rollouts.num_problems / len(self.train_dataset),
        )

    def add_callback(self, callback: Any) -> None:
        """Add a callback, given as an object or class. Its method `on_init_end` is not called."""
        self._listener.add(callback)

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train the model.

        Args:
            resume_from_checkpoint: True continues the run in `args.output_dir` from its newest checkpoint. A path of a
                folder in `checkpoints` of this directory continues from that checkpoint. On a CPU, the results are
                bit-identical to those of an uninterrupted run. Fields that only later iterations depend on, such as
                `max_steps` and `learning_rate`, may differ from those of the run.
        Raises:
            UserError: if `args.output_dir` already contains a run and `resume_from_checkpoint` is None or False, if the
                path is not a checkpoint of the run, or if the run to resume has other settings that must not change.
        """
        with self.args.names.in_errors():
            start: Any = train
            if resume_from_checkpoint not in (None, False):
                start = functools.partial(resume, checkpoint=self._checkpoint(resume_from_checkpoint))
                self._check_reference()
            self._train_called = True
            tables: dict[Split, Any] = {"train": self.train_dataset}
            if self.eval_dataset is not None:
                tables["validation"] = self.eval_dataset
            summary = start(
                self.config,
                recipe="trainer",
                reward_fn=self.reward_funcs,
                reporter=self._listener,
                in_memory=InMemory(self.policy, tables),
            )
        report_finished(Path(self.config.run.dir), summary)
        losses = self._listener.losses
        return TrainOutput(summary["updates"], sum(losses) / max(1, len(losses)), summary)

    def _checkpoint(self, given: Any) -> str:
        """Return the argument `checkpoint` of `resume`: `newest`, or the number of an iteration.

        Args:
            given: the argument `resume_from_checkpoint` of `train`, which is not None or False.
        Raises:
            UserError: if `given` is a path that is not a checkpoint of the run in `args.output_dir`.
        """
        if not isinstance(given, str | Path):
            return "newest"
        folder, path = Path(self.args.output_dir) / "checkpoints", Path(given)
        if path.is_dir() and path.name.isdecimal() and path.resolve().parent == folder.resolve():
            return str(int(path.name))
        present = [str(entry) for entry in sorted(folder.glob("*")) if entry.name.isdecimal()]
        problem = "is not a checkpoint of the run in output_dir" if path.exists() else "does not exist"
        raise UserError(
            f"resume_from_checkpoint is {str(given)!r}, which {problem}; allowed: True (the newest checkpoint of the "
            f"run in output_dir){''.join(f', {name}' for name in present)}"
        )

    def _check_reference(self) -> None:
        """Raise UserError if the KL penalty needs the starting model, but `train` has already changed its weights."""
        if self._train_called and self.config.learner.kl.coefficient > 0 and not self.policy.restorable:
            raise UserError(
                "the model of this trainer is already trained, but beta needs the model that the run started from; "
                "create a new VinePPOTrainer and call its train(resume_from_checkpoint=True)"
            )

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Measure the mean reward of responses to the prompts of a data set.

        Args:
            eval_dataset: rows with a column `prompt`; None means the `eval_dataset` of the trainer.
        Returns:
            A dictionary with the mean reward `eval_reward`, and `eval_reward_low` and `eval_reward_high`, the bounds of
            its 95% confidence interval. Completions for which every reward function returned None are left out; if none
            remains, the numbers are NaN.
        """
        with self.args.names.in_errors():
            interval = self._mean_reward(
                checked_rows("eval_dataset", self.eval_dataset if eval_dataset is None else eval_dataset)
            )
        return {"eval_reward": interval.mean, "eval_reward_low": interval.low, "eval_reward_high": interval.high}

    def _mean_reward(self, rows: Any) -> Interval:
        """Measure the mean reward of responses to the prompts of a data set."""
        task = build_task(self.config.task, self.policy.codec.chat_prompt, self.reward_funcs, {"validation": rows})
        sampler = build_engine(self.config, self.policy)
        try:
            measured = measure(
                self.policy.codec,
                sampler,
                task,
                problem_range(task, "validation", len(rows)),
                num_samples=self.config.eval.num_samples,
                max_new_tokens=self.config.rollouts.max_new_tokens,
                temperature=self.config.eval.temperature,
                stop=self.config.rollouts.stop,
                address=(self.config.run.seed, "evaluate"),
            )
        finally:
            close(sampler)
        return measured.mean_reward(self.config.run.seed)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the model and the tokenizer.

        If the model has adapters, the merged weights are saved, and the adapters alone are saved in the folder
        `adapter`.

        Args:
            output_dir: directory to write to; None means the folder `final` in the run directory.
        """
        if launched_ranks()[0] == 0:
            self.policy.save(output_dir or Path(self.args.output_dir) / "final")


def _ignore(*_: Any) -> None:
    """Do nothing. Reward functions get this function as their argument `log_extra`.

    In TRL, `log_extra` adds a column to a table of completions. This package has no such table.
    """


def _with_extra_arguments(function: Callable[..., Any], more: Mapping[str, Any]) -> Callable[..., Any]:
    """Bind those of the arguments `more` that the signature of a reward function accepts.

    Returns:
        A function with the same `__name__`, which becomes the name of a metric. If the reward function accepts none of
        the arguments, the reward function itself.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # The signature of some callables cannot be read.
        return function
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    chosen = {name: value for name, value in more.items() if takes_all or name in parameters}
    if not chosen:
        return function
    wrapped = functools.partial(function, **chosen)
    functools.update_wrapper(wrapped, function)
    if not hasattr(wrapped, "__name__"):
        wrapped.__name__ = type(function).__name__  # type: ignore[attr-defined]
    return wrapped


def _policy(model: Any, processing_class: Any, peft_config: Any, args: VinePPOConfig) -> Policy:
    """Build the policy from the arguments of the trainer, with new adapters if `peft_config` is not None."""
    if isinstance(model, str | Path):
        model, loaded_tokenizer = _loaded(str(model), args)
        tokenizer = processing_class or loaded_tokenizer
    else:
        tokenizer = processing_class or _tokenizer_of(model)
        model = _placed(model, args)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        if peft_config is not None:
            raise UserError("model already has adapters, so peft_config must be None; pass only one of the two")
        if args.beta > 0 and any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name):
            raise UserError(
                "model has trained adapters, but the reference model of the KL penalty (beta) has none; merge them "
                "first (model.merge_and_unload()) and pass peft_config, or set beta to 0"
            )
        base = model.get_base_model()
        return Policy(base, Codec.for_model(base, tokenizer), model)
    codec = Codec.for_model(model, tokenizer)
    if peft_config is None:
        return Policy(model, codec)
    import peft  # installed, because peft_config is an object of peft

    check_new_adapters(peft_config)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)  # The initial adapters depend only on args.seed.
        try:
            return Policy(model, codec, peft.get_peft_model(model, peft_config))
        except ValueError as error:
            raise UserError(f"peft_config does not fit the model: {message_line(error)}") from error


def _device(args: VinePPOConfig) -> str:
    """Return the device for training: `cuda` if PyTorch finds a GPU and `args.use_cpu` is False, otherwise `cpu`.

    If a launcher has started several processes, each process of a machine uses its own GPU.
    """
    if launched_ranks()[1] > 1 and torch.cuda.is_available() and not args.use_cpu:
        use_own_gpu()
    return "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"


def _placed(model: Any, args: VinePPOConfig) -> Any:
    """Move a model object to the device for training, and enable gradient checkpointing if `args` say so.

    The dtype is not changed. A model that transformers has distributed over devices is not moved.
    """
    if not getattr(model, "hf_device_map", None):
        model = model.to(_device(args))
    return with_checkpointing(model) if args.gradient_checkpointing else model


def _model_config(policy: Policy, args: VinePPOConfig) -> ModelConfig:
    """Return the section `model` of the configuration, which describes the policy in config.yaml.

    The section is only a description: a model object cannot always be loaded from it.
    """
    lora = LoraConfig()
    if policy.adapters is not None:
        adapter_config = next(iter(policy.adapters.peft_config.values()))
        rank, alpha, dropout = (getattr(adapter_config, name, 0) for name in ("r", "lora_alpha", "lora_dropout"))
        lora = LoraConfig(r=rank or 0, alpha=alpha or 1.0, dropout=dropout or 0.0, targets=_targets(adapter_config))
    return ModelConfig(
        path=getattr(policy.model.config, "_name_or_path", "") or "in memory",
        dtype="bfloat16" if next(policy.model.parameters()).dtype == torch.bfloat16 else "float32",
        device=str(policy.device) if launched_ranks()[1] == 1 else policy.device.type,
        gradient_checkpointing=args.gradient_checkpointing,
        trust_remote_code=args.trust_remote_code,
        lora=lora,
    )


def _targets(peft_config: Any) -> tuple[str, ...]:
    """Return the names of the layers that have adapters, as in the setting `model.lora.targets`."""
    names = getattr(peft_config, "target_modules", None) or ()
    return (names,) if isinstance(names, str) else tuple(sorted(names)) or ("all-linear",)


def _loaded(path: str, args: VinePPOConfig) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a path or hub id, with the options in `args.model_init_kwargs`."""
    init = dict(args.model_init_kwargs or {})
    dtype = init.pop("dtype", init.pop("torch_dtype", None)) or ("bfloat16" if args.bf16 else "float32")
    trusted = init.pop("trust_remote_code", args.trust_remote_code)
    values = {
        "path": path,
        "dtype": str(_training_dtype(path, trusted) if dtype == "auto" else dtype).removeprefix("torch."),
        "device": _device(args),
        "gradient_checkpointing": args.gradient_checkpointing,
        "trust_remote_code": trusted,
        "attn_implementation": init.pop("attn_implementation", ""),
    }
    if init:
        raise UserError(
            f"model_init_kwargs has {', '.join(init)}; allowed: dtype, attn_implementation, trust_remote_code; for "
            "other arguments, load the model and pass the object"
        )
    return load_pretrained(config_from_dict(Config, {f"model.{k}": v for k, v in values.items()}, "in args").model)


def _training_dtype(path: str, trusted: bool) -> str:
    """Return the dtype that `auto` selects: bfloat16 if the weights are stored in bfloat16, otherwise float32.

    Args:
        path: path or hub id of the model.
        trusted: whether the Python code of a hub model may run.
    """
    from transformers import AutoConfig

    try:
        stored = AutoConfig.from_pretrained(path, trust_remote_code=trusted).dtype
    except (OSError, ValueError):  # The caller then loads the model, which raises an error with a better message.
        return "float32"
    return "bfloat16" if str(stored).endswith("bfloat16") else "float32"


def _tokenizer_of(model: Any) -> Any:
    """Load the tokenizer from the path or hub id in the configuration of a model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.config._name_or_path)
    except (OSError, ValueError) as error:
        raise UserError("processing_class is missing; pass the model's tokenizer") from error
