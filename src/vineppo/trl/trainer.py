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

The trainer runs the same training as `vineppo train`, with the settings that `VinePPOConfig.to_config` returns.
docs/from-trl.md lists for each field of TRL the corresponding setting of vineppo.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vineppo.config.load import diff_configs
from vineppo.config.schema import Config, LoraConfig, ModelConfig
from vineppo.config.settings import replace
from vineppo.model.codec import Codec
from vineppo.model.loading import load_pretrained
from vineppo.model.modes import with_checkpointing
from vineppo.model.policy import Policy
from vineppo.run.directory import RunDirectory
from vineppo.run.trl_names import with_trl_names
from vineppo.tasks import build_task
from vineppo.tasks.grading.graders import load_grader
from vineppo.tasks.rows import as_sequence
from vineppo.training.configure import config_from_dict
from vineppo.training.evaluate import measure
from vineppo.training.loop import resume, train
from vineppo.training.parts import InMemory, build_engine, total_updates
from vineppo.training.rollouts import problem_range
from vineppo.trl.config import VinePPOConfig
from vineppo.types import Split, UserError

__all__ = ["TrainOutput", "VinePPOConfig", "VinePPOTrainer"]


class TrainOutput(NamedTuple):
    """The result of `VinePPOTrainer.train`. The fields have the same names as in transformers."""

    global_step: int
    """Number of updates."""
    training_loss: float
    """Mean of the logged policy losses. The loss does not show whether the policy has improved."""
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
        callbacks: `TrainerCallback` objects or classes of transformers.
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
        self.args = args or VinePPOConfig()
        self.reward_funcs = _reward_functions(reward_funcs)
        self.train_dataset, self.eval_dataset = _rows("train_dataset", train_dataset), eval_dataset
        self.policy = _policy(model, processing_class, peft_config, self.args)
        self.model, self.processing_class = self.policy.adapters or self.policy.model, self.policy.codec.tokenizer
        num_eval = 0 if eval_dataset is None else len(_rows("eval_dataset", eval_dataset))
        config = self.args.to_config(len(self.train_dataset), num_eval)
        self.config = replace(config, model=_model_config(self.policy, self.args))
        if all(isinstance(function, str) for function in self.reward_funcs):
            # With `task.rewards`, `build_task` runs slow graders in separate processes, which can be stopped if they
            # exceed the time limit.
            names, self.reward_funcs = tuple(self.reward_funcs), []
            self.config = replace(self.config, task=replace(self.config.task, rewards=names))
        self.reward_funcs = [load_grader(reward) if isinstance(reward, str) else reward for reward in self.reward_funcs]
        self._listener = _Listener(self, [entry() if isinstance(entry, type) else entry for entry in callbacks or ()])
        self.state = self._listener.state
        more = {"trainer_state": self.state, "log_metric": self._listener.note, "log_extra": _ignore}
        self.reward_funcs = [_with_extra_arguments(reward, more) for reward in self.reward_funcs]
        self._train_called = False

    def train(self, resume_from_checkpoint: bool = False) -> TrainOutput:
        """Train the model.

        Args:
            resume_from_checkpoint: whether to continue the run in `args.output_dir` from its last checkpoint. On a CPU,
                the results are bit-identical to those of an uninterrupted run.
        Raises:
            UserError: if `args.output_dir` already contains a run and `resume_from_checkpoint` is False, or if the run
                to resume has different settings.
        """
        if resume_from_checkpoint:
            self._check_resume()
        self._train_called = True
        tables: dict[Split, Any] = {"train": self.train_dataset}
        if self.eval_dataset is not None:
            tables["validation"] = _rows("eval_dataset", self.eval_dataset)
        start = resume if resume_from_checkpoint else train
        summary = start(
            self.config,
            recipe="trainer",
            reward_fn=self.reward_funcs,
            reporter=self._listener,
            in_memory=InMemory(self.policy, tables),
        )
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        return TrainOutput(summary["updates"], sum(losses) / max(1, len(losses)), summary)

    def _check_resume(self) -> None:
        """Raise UserError if the run in `args.output_dir` cannot be resumed.

        This is the case if the run has other settings. It is also the case if the KL penalty needs the starting model,
        and `train` has already changed the weights of the model in this object.
        """
        recorded = RunDirectory.open(self.args.output_dir, writable=False).config
        before = config_from_dict(Config, recorded, f"in {self.args.output_dir}/config.yaml")
        changes = diff_configs(before, self.config)
        if changes:
            raise UserError(
                f"resuming {self.args.output_dir} cannot change the run's settings ({'; '.join(changes)}); restore the "
                "old settings, or start a new run in another output_dir"
            )
        if self._train_called and self.config.learner.kl.coefficient > 0 and self.policy.adapters is None:
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
        rows = _rows("eval_dataset", self.eval_dataset if eval_dataset is None else eval_dataset)
        task = build_task(self.config.task, self.policy.codec.chat_prompt, self.reward_funcs, {"validation": rows})
        measured = measure(
            self.policy.codec,
            build_engine(self.config, self.policy),
            task,
            problem_range(task, "validation", len(rows)),
            num_samples=self.config.eval.num_samples,
            max_new_tokens=self.config.rollouts.max_new_tokens,
            temperature=self.config.eval.temperature,
            stop=self.config.rollouts.stop,
            address=(self.config.run.seed, "evaluate"),
        )
        interval = measured.mean_reward(self.config.run.seed)
        return {"eval_reward": interval.mean, "eval_reward_low": interval.low, "eval_reward_high": interval.high}

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the model and the tokenizer.

        If the model has adapters, the merged weights are saved, and the adapters alone are saved in the folder
        `adapter`.

        Args:
            output_dir: directory to write to; None means the folder `final` in the run directory.
        """
        self.policy.save(output_dir or Path(self.args.output_dir) / "final")


class _Listener:
    """Calls transformers callbacks during a run; implements `vineppo.training.session.Reporter`.

    Args:
        trainer: the trainer that runs.
        callbacks: `TrainerCallback` objects.
    """

    def __init__(self, trainer: VinePPOTrainer, callbacks: Sequence[Any]):
        from transformers import TrainerControl, TrainerState

        self.trainer, self.callbacks = trainer, list(callbacks)
        self.state, self.control = TrainerState(), TrainerControl()
        self._noted: dict[str, list[float]] = defaultdict(list)

    def note(self, name: str, value: float) -> None:
        """Record a number that a reward function passed to `log_metric`.

        The logs of an iteration contain, for each name, the mean of the numbers recorded during the iteration.
        """
        self._noted[name].append(float(value))

    def start(self) -> None:
        """Set `state.max_steps` and call `on_train_begin`."""
        self.state.max_steps = total_updates(self.trainer.config)
        self._call_callbacks("on_train_begin")

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Call `on_step_end`, `on_evaluate` if there was an evaluation, and `on_log`. Print the mean rewards as JSON.

        For the callbacks, an iteration is one step. `state.global_step` counts updates.

        Args:
            metrics: content of the iteration's line in metrics.jsonl. Iteration 0 is the time before training.
        """
        logs = with_trl_names(metrics)
        logs |= {name: sum(values) / len(values) for name, values in self._noted.items()}
        self._noted.clear()
        self.state.global_step = int(metrics.get("updates") or 0)
        logs["step"] = self.state.global_step
        problems = self.trainer.config.rollouts.num_problems * metrics["iteration"]
        self.state.epoch = logs["epoch"] = problems / len(self.trainer.train_dataset)
        self.state.log_history.append(logs)
        if metrics["iteration"]:
            self._call_callbacks("on_step_end")
        if "eval/accuracy" in metrics:
            self._call_callbacks("on_evaluate", metrics=logs)
        self._call_callbacks("on_log", logs=logs)
        print(json.dumps({key: logs[key] for key in ("iteration", "reward", "eval_reward") if key in logs}), flush=True)

    def wants_to_stop(self) -> bool:
        """Return whether a callback has set `control.should_training_stop` to True."""
        return bool(self.control.should_training_stop)

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """Call `on_train_end`."""
        self._call_callbacks("on_train_end")

    def _call_callbacks(self, event: str, **more: Any) -> None:
        """Call the method named `event` of each callback that has it, with `more` as additional arguments."""
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                given = {"model": self.trainer.model, "processing_class": self.trainer.processing_class, **more}
                changed = method(self.trainer.args, self.state, self.control, **given)
                # A callback may return a new TrainerControl, or None.
                self.control = self.control if changed is None else changed


def _reward_functions(given: Any) -> list[Any]:
    """Return the argument `reward_funcs` as a list of functions and names. Raise UserError if it is not valid."""
    functions = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    if not functions:
        raise UserError("reward_funcs is empty; pass a function fn(prompts, completions, **columns) -> list of numbers")
    for function in functions:
        if not isinstance(function, str) and (isinstance(function, torch.nn.Module) or not callable(function)):
            raise UserError(
                f"reward_funcs has a {type(function).__name__}; allowed: functions and names of graders (hash, boxed, "
                "exact, module:function); to use a reward model, pass a function that calls the model"
            )
    return functions


def _rows(name: str, dataset: Any) -> Any:
    """Return a data set as a sequence of rows. Raise UserError if it is missing or empty.

    Args:
        name: name of the argument in the error message, such as `train_dataset`.
    """
    if dataset is None:
        raise UserError(f"{name} is missing; pass rows with a column named prompt")
    rows = as_sequence(dataset)
    if not len(rows):
        raise UserError(f"{name} is empty; pass rows with a column named prompt")
    return rows


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

    with torch.random.fork_rng():
        torch.manual_seed(args.seed)  # The initial adapters depend only on args.seed.
        try:
            return Policy(model, codec, peft.get_peft_model(model, peft_config))
        except ValueError as error:
            raise UserError(f"peft_config does not fit the model: {str(error).splitlines()[0]}") from error


def _device(args: VinePPOConfig) -> str:
    """Return the device for training: `cuda` if PyTorch finds a GPU and `args.use_cpu` is False, otherwise `cpu`."""
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
        device=str(policy.device),
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
