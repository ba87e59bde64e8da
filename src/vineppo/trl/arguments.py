"""Check the arguments of `VinePPOTrainer`. Each mistake raises UserError with one line that names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vineppo.tasks.grading.graders import GRADERS, load_grader
from vineppo.tasks.grading.rewards import check_signature
from vineppo.tasks.rows import as_sequence
from vineppo.trl.config import VinePPOConfig
from vineppo.types import UserError


def check_config(args: Any) -> None:
    """Raise UserError if the argument `args` is neither a VinePPOConfig nor None."""
    if args is None or isinstance(args, VinePPOConfig):
        return
    advice = "pass VinePPOConfig(**args)" if isinstance(args, Mapping) else "VinePPOConfig has the same fields; use it"
    raise UserError(f"args is a {type(args).__name__}; it must be a VinePPOConfig ({advice})")


def check_model(model: Any, processing_class: Any, peft_config: Any) -> None:
    """Check the types of the model, the tokenizer and the settings of adapters.

    Raises:
        UserError: if one of them has a type that is not allowed, or peft is needed and not installed.
    """
    if not isinstance(model, str | Path) and not _is_language_model(model):
        kind = "None" if model is None else f"a {type(model).__name__}"
        advice = "; pass a tokenizer as processing_class" if _is_tokenizer(model) else ""
        raise UserError(
            f"model is {kind}; it must be a path, a Hugging Face Hub id, or a causal language model of transformers or "
            f"peft{advice}"
        )
    if processing_class is not None and not _is_tokenizer(processing_class):
        raise UserError(
            f"processing_class is {_shown(processing_class)}; it must be a tokenizer, for example "
            "AutoTokenizer.from_pretrained(NAME), or None to load the tokenizer of the model"
        )
    if peft_config is None:
        return
    try:
        from peft import PeftConfig
    except ModuleNotFoundError as error:
        raise UserError("peft_config needs peft, which is not installed: pip install 'vineppo[lora]'") from error
    if not isinstance(peft_config, PeftConfig):
        raise UserError(
            f"peft_config is {_shown(peft_config)}; it must be a configuration of peft, such as peft.LoraConfig(r=16)"
        )


def check_object_settings(model: Any, args: VinePPOConfig) -> None:
    """Raise UserError if a field of `args` has no effect because the model is an object, which is already loaded."""
    if isinstance(model, str | Path):
        return
    if args.model_init_kwargs:
        raise UserError(
            f"model_init_kwargs is {args.model_init_kwargs!r}, but model is an object, which is already loaded; pass "
            "these arguments to from_pretrained and remove model_init_kwargs, or pass the path of the model"
        )
    dtype = next(model.parameters()).dtype
    if args.bf16 and dtype != torch.bfloat16:
        raise UserError(
            f"bf16 is True, but model is an object in {str(dtype).removeprefix('torch.')}, whose dtype is not changed; "
            "load it with dtype=torch.bfloat16, pass the path of the model, or set bf16 to False"
        )


def check_evaluation(eval_dataset: Any, args: VinePPOConfig) -> None:
    """Raise UserError if `args` ask for evaluations during training and there is no data set for them."""
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    if eval_dataset is None and strategy != "no":
        raise UserError(f"eval_strategy is {strategy!r}, but eval_dataset is missing; pass it, or set 'no'")


def checked_callbacks(callbacks: Any) -> list[Any]:
    """Return the argument `callbacks` as a list. Raise UserError if it is not a list of callbacks."""
    if callbacks is None:
        return []
    if not isinstance(callbacks, list | tuple):
        raise UserError(f"callbacks is {_shown(callbacks)}; it must be a list: callbacks=[...]")
    for callback in callbacks:
        if not any(name.startswith("on_") for name in dir(callback)):
            raise UserError(
                f"callbacks has {_shown(callback)}; allowed: objects and classes with methods of "
                "transformers.TrainerCallback, such as on_step_end"
            )
    return list(callbacks)


def reward_functions(given: Any) -> list[Any]:
    """Return the argument `reward_funcs` as a list of functions and names.

    Raises:
        UserError: if it is empty, or one of its items is not a reward function or the name of one.
    """
    functions = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    if not functions:
        raise UserError("reward_funcs is empty; pass a function fn(prompts, completions, **columns) -> list of numbers")
    for function in functions:
        name = function if isinstance(function, str) else ""
        is_model_name = "/" in name and ":" not in name
        if is_model_name or isinstance(function, torch.nn.Module) or not (name or callable(function)):
            raise UserError(
                f"reward_funcs has {_shown(function)}; allowed: functions and names of graders ({', '.join(GRADERS)}, "
                "module:function); a reward model is not supported directly: pass a function that calls it"
            )
        check_signature(load_grader(name) if name else function, name)
    return functions


def checked_rows(name: str, dataset: Any) -> Any:
    """Return a data set as a sequence of rows. Raise UserError if it is missing or empty, or is not a data set.

    Args:
        name: name of the argument in the error message, such as `train_dataset`.
    """
    if dataset is None:
        raise UserError(f"{name} is missing; pass rows with a column named prompt")
    allowed = "it must be a datasets.Dataset or a list of dictionaries, with a prompt in each row"
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(str, dataset))
        raise UserError(
            f'{name} is a {type(dataset).__name__} with {splits}; {allowed}: pass one split, such as ["train"]'
        )
    if isinstance(dataset, str | Path):
        raise UserError(
            f"{name} is {str(dataset)!r}; {allowed}; load a file with datasets.load_dataset('json', "
            f"data_files={str(dataset)!r}, split='train')"
        )
    if not isinstance(dataset, Iterable) and not hasattr(dataset, "__getitem__"):
        raise UserError(f"{name} is {_shown(dataset)}; {allowed}")
    rows = as_sequence(dataset)
    if not len(rows):
        raise UserError(f"{name} is empty; pass rows with a column named prompt")
    return rows


def _is_language_model(model: Any) -> bool:
    """Return whether an object is a model of transformers or peft with an output layer over the vocabulary."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        return False
    output = getattr(model, "get_output_embeddings", None)
    return output is not None and output() is not None


def _is_tokenizer(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("decode", "all_special_ids", "apply_chat_template"))


def _shown(value: Any) -> str:
    """Return the type of a value, or a short text or dictionary itself."""
    shown = repr(value) if isinstance(value, str | int | float | Mapping) else ""
    return shown if 0 < len(shown) <= 60 else f"a {type(value).__name__}"
