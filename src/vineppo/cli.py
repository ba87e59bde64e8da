"""The door: `vineppo <command>`. Parse, call, print; what the commands do stands elsewhere.

Heavy modules (PyTorch and all that need it) are imported inside the commands, so that `--help` and a user's mistake
are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vineppo.config import Config, EvalSpec, SFTConfig
from vineppo.hardware import cpu_multiplies, keep_freed_memory
from vineppo.options import Command, Request, add_note, add_settings, count, parse_request, parser_of
from vineppo.report import ConsoleReporter, duration, interval_text
from vineppo.settings import (
    COMMAND_LINE,
    build_config,
    config_from_dict,
    config_from_layers,
    did_you_mean,
    diff_configs,
    is_sft_recipe,
    load_recipe,
    recipe_names,
    recipe_stem,
    settings_of,
)
from vineppo.types import UserError

DEFAULT_RECIPE = "judgement"
_SET_BY_COMPARE = ("algorithm", "run.dir", "run.seed", "run.iterations")
_BUDGETS = ("run.max_updates", "run.max_tokens", "run.max_seconds")
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "matplotlib", "rich")
_EXTRAS = ("peft", "datasets", "math-verify", "reasoning-gym", "trl", "vllm", "ray", "tensorboard", "wandb", "trackio")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 the user's mistake (one line on stderr), 130 interrupted."""
    warnings.showwarning = _show_warning
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone, for example `| head`
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes
        return 141
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {error.filename} is too long for the name of a file", file=sys.stderr)
        return 2
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in one line, without the place in the source that it came from."""
    print(f"warning: {' '.join(str(message).splitlines())}", file=sys.stderr, flush=True)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"vineppo {_version()}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        hint = did_you_mean(name, ["--help", "--version"] if name.startswith("-") else COMMANDS)
        raise UserError(f"unknown {what} {name}; {hint + ' ' if hint else ''}commands: {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    parser = parser_of(name, command)
    if "-h" in rest or "--help" in rest:
        parser.print_help()
        return 0
    keep_freed_memory()
    return command.run(parse_request(parser, command, rest))


def _overview() -> str:
    purposes = "\n".join(f"  {name:<9} {command.purpose}" for name, command in COMMANDS.items())
    return (
        "usage: vineppo COMMAND [...]\n\n"
        "Fine-tune language models by reinforcement learning and give every reasoning step the credit it earned.\n\n"
        f"commands:\n{purposes}\n\n"
        "  vineppo COMMAND --help   its options and examples\n"
        "  vineppo --version        the version"
    )


def _version() -> str:
    import vineppo

    return str(vineppo.__version__)


# --- train, demo ------------------------------------------------------------------------------------------------------


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the run in this directory, with its own settings, from its newest whole checkpoint",
    )
    _add_recipe_note(parser, f"RECIPE (default: {DEFAULT_RECIPE})", sft=False)
    add_settings(parser, Config)


def _add_recipe_note(parser: argparse.ArgumentParser, title: str, sft: bool) -> None:
    names = [name for name in recipe_names() if is_sft_recipe(name) is sft]
    add_note(
        parser,
        title,
        f"Path of a YAML file, or one of: {', '.join(names)}. The defaults below are those of settings that neither "
        "the recipe nor the command line gives. Lists are written a,b or [a, b].",
    )


def _train(request: Request) -> int:
    if request.options["resume"] is not None:
        return _resume(request)
    recipe = request.positional or DEFAULT_RECIPE
    config = _training_config(recipe, request.overrides)
    if not config.run.dir:
        folder = f"runs/{recipe_stem(recipe)}-{config.algorithm}-seed{config.run.seed}"
        config = replace(config, run=replace(config.run, dir=folder))
    return _exit_code(_train_with(config, recipe_stem(recipe)))


def _training_config(recipe: str, overrides: Mapping[str, str], algorithm: str | None = None) -> Config:
    _check_kind(recipe, "train")
    return build_config(load_recipe(recipe), algorithm, overrides, name=recipe)


def _check_kind(recipe: str, command: str) -> None:
    """Say it plainly when a recipe of the package belongs to the other command."""
    names = recipe_names()
    owner = "sft" if is_sft_recipe(recipe) else "train"
    if recipe in names and owner != command:
        fitting = [name for name in names if is_sft_recipe(name) is (command == "sft")]
        known = ", ".join(fitting) or "none"
        raise UserError(f"{recipe} is a recipe of `vineppo {owner}`; recipes of `vineppo {command}`: {known}")


def _train_with(config: Config, recipe: str) -> dict[str, Any]:
    from vineppo.train import train

    with _reporter() as reporter:
        return train(config, recipe=recipe, reporter=reporter)


def _resume(request: Request) -> int:
    from vineppo.run import RunDirectory

    if request.positional is not None:
        raise UserError(
            f"--resume goes on with a run's own settings and takes no recipe; leave out {request.positional}"
        )
    folder = request.options["resume"]
    run = RunDirectory.open(folder, writable=False)
    layers = [(run.config, f"in {folder}/config.yaml")]
    config = config_from_dict(Config, *layers[0])
    changes = diff_configs(config, config_from_layers(Config, [*layers, (request.overrides, COMMAND_LINE)]))
    if changes:
        mend = "leave those options out, or start a new run with them"
        raise UserError(f"--resume {folder} cannot change the run's settings ({'; '.join(changes)}); {mend}")
    config = replace(config, run=replace(config.run, dir=str(folder)))  # it may have been moved since
    from vineppo.train import resume

    with _reporter() as reporter:
        return _exit_code(resume(config, recipe=_recipe_of(run.summary), reporter=reporter))


def _recipe_of(summary: Path) -> str:
    try:
        return str(json.loads(summary.read_text(encoding="utf-8")).get("recipe") or "")
    except (OSError, ValueError, AttributeError):
        return ""


@contextlib.contextmanager
def _reporter() -> Iterator[ConsoleReporter]:
    reporter = ConsoleReporter()
    try:
        yield reporter
    finally:
        reporter.close()


def _exit_code(summary: Mapping[str, Any]) -> int:
    return 130 if summary.get("finish_reason") == "interrupted" else 0


_DEMO_KEYS = ("algorithm", "run.dir", "run.seed", "run.iterations")


def _demo_options(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, Config, hidden=set(settings_of(Config)) - set(_DEMO_KEYS))


def _demo(request: Request) -> int:
    folder = request.overrides.get("run.dir") or _free_directory(Path("runs/demo"))
    config = _training_config(DEFAULT_RECIPE, {**request.overrides, "run.dir": str(folder)})
    print(
        "A tiny language model that ships with the package solves chains of arithmetic; each step may be written in a\n"
        "reliable or in a risky way. It now learns, by reward alone, which way to choose at which step.\n"
    )
    summary = _train_with(config, DEFAULT_RECIPE)
    if not _exit_code(summary):
        other = "grpo" if config.algorithm != "grpo" else "vineppo"
        print("\nNext:")
        print(f"  vineppo eval {folder}")
        print(f"  vineppo train {DEFAULT_RECIPE} --algorithm {other}")
    return _exit_code(summary)


def _free_directory(first: Path) -> Path:
    """runs/demo, or runs/demo-2, runs/demo-3, ... where that exists."""
    number, path = 1, first
    while path.exists():
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    return path


# --- sft --------------------------------------------------------------------------------------------------------------


def _sft_options(parser: argparse.ArgumentParser) -> None:
    _add_recipe_note(parser, "RECIPE (may be left out)", sft=True)
    add_settings(parser, SFTConfig)


def _sft(request: Request) -> int:
    layers: list[tuple[Mapping[str, Any], str]] = [(request.overrides, COMMAND_LINE)]
    if request.positional is not None:
        _check_kind(request.positional, "sft")
        recipe = {key: value for key, value in load_recipe(request.positional).items() if key != "description"}
        layers.insert(0, (recipe, f"in recipe {request.positional}"))
    config = config_from_layers(SFTConfig, layers)
    from vineppo.sft import run_sft

    for name, value in run_sft(config).items():
        print(f"{name:<10} {_plain(name, value)}")
    return 0


def _plain(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return interval_text(value)
    if name == "seconds":
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)


# --- eval -------------------------------------------------------------------------------------------------------------


def _eval_options(parser: argparse.ArgumentParser) -> None:
    add_note(
        parser,
        "MODEL",
        "A model directory, a hub id, embedded:judgement or embedded:habit; or a run's directory or a recipe's YAML "
        "file, whose final or starting model is measured with its own task, response budget and stop strings. Greedy "
        "decoding is always measured too.",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    add_settings(parser, EvalSpec, hidden=("model.path",))


def _eval(request: Request) -> int:
    if request.positional is None:
        raise UserError("no MODEL is given; name a model directory, a hub id, embedded:judgement, a run or a recipe")
    target = _json_target(request)
    if "model.path" in request.overrides:
        raise UserError("--model.path is MODEL, which stands without dashes; leave it out")
    own = _own_evaluation(request.positional)
    spec: Any = config_from_layers(EvalSpec, [own, (request.overrides, COMMAND_LINE)])
    from vineppo.evaluate import evaluate_model

    result = evaluate_model(spec)
    _print_evaluation(request.positional, result)
    _write_json(target, {"model": request.positional, **result})
    return 0


def _json_target(request: Request) -> Path | None:
    """Where --json wants its file, refused before anything is computed if it cannot be there."""
    target = request.options["json"] and Path(request.options["json"])
    if target and (os.path.isdir(target) or not os.path.isdir(target.absolute().parent)):
        raise UserError(f"--json {target} cannot be written: give a file in an existing directory")
    return target or None


def _write_json(target: Path | None, figures: Mapping[str, Any]) -> None:
    if target is None:
        return
    from vineppo.files import write_text

    try:
        write_text(target, json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json {target} cannot be written ({error.strerror})") from None
    print(f"written to {target}")


def _run_of(path: Path) -> Path | None:
    """The run that a MODEL belongs to: it is the run's directory, or the model inside."""
    inside = path.parent if path.name == "final" else path
    return inside if os.path.isfile(inside / "config.yaml") else None


def _own_evaluation(model: str) -> tuple[dict[str, Any], str]:
    """What `eval` takes over from MODEL: the form and place of the model, and of a run or recipe all that it sets."""
    run_dir = _run_of(Path(model))
    if run_dir:
        return _evaluation_of(_config_of_finished(run_dir), str(run_dir / "final")), f"in {run_dir}/config.yaml"
    if Path(model).suffix in (".yaml", ".yml"):
        recipe = build_config(load_recipe(model), name=model)
        return _evaluation_of(recipe, recipe.model.path), f"in recipe {model}"
    return {"model.path": model}, COMMAND_LINE


def _config_of_finished(run_dir: Path) -> Config:
    from vineppo.run import RunDirectory

    run = RunDirectory.open(run_dir, writable=False)
    if not run.final.is_dir():
        raise UserError(f"{run_dir} has no final model yet; finish it with `vineppo train --resume {run_dir}`")
    return config_from_dict(Config, run.config, f"in {run_dir}/config.yaml")


def _evaluation_of(config: Config, model: str) -> dict[str, Any]:
    """EvalSpec's keys as a training has them, with another place of the model."""
    held = {"model": asdict(config.model) | {"path": model}, "task": asdict(config.task)}
    return {**held, "max_new_tokens": config.rollouts.max_new_tokens, "stop": config.rollouts.stop}


def _print_evaluation(model: str, result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['num_problems']} {result.get('split', '')} problems")
    table.add_column("measure")
    table.add_column("accuracy [95%]", justify="right")
    for name, value in result.items():
        if isinstance(value, Mapping):
            table.add_row(name, interval_text(value).replace("[", r"\["))
    print(f"{model}")
    Console().print(table)
    spent = f"{result['tokens']:,} tokens in {duration(result['seconds'])}"
    cut = f"{100 * result['truncated_share']:.1f}% of responses reached the token budget"
    print(f"{result['num_samples']} samples per problem; {cut}; {spent}")
    if result.get("grader/error_share"):
        late = f"{100 * result['grader/timeout_share']:.1f}% too late"
        print(f"{100 * result['grader/error_share']:.1f}% of responses could not be graded ({late}) and count as wrong")


# --- compare ----------------------------------------------------------------------------------------------------------


def _compare_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--algorithms", metavar="A,B", help="compared algorithms (default: vineppo,ppo,grpo,rloo)")
    add("--seeds", metavar="N", help="runs per algorithm, with seeds 0 to N-1 (default: 5)")
    add("--budget", metavar="KIND=N", help="of each run: updates=N, tokens=N or seconds=N (default: updates=96)")
    add("--out", metavar="DIR", help="directory of the comparison; one that stopped half-way goes on from there")
    add("--jobs", metavar="N", help="runs at the same time; more than 1 makes seconds less meaningful (default: 1)")
    _add_recipe_note(parser, "RECIPE", sft=False)
    add_settings(parser, Config, hidden={*_SET_BY_COMPARE, *_BUDGETS})


def _compare(request: Request) -> int:
    from vineppo.compare import CompareSpec, compare, parse_budget, settings_of_budget

    recipe, options = request.positional, request.options
    if recipe is None:
        raise UserError(f"no RECIPE is given; recipes: {', '.join(_training_recipes())}, or the path of a YAML file")
    if options["out"] is None:
        raise UserError("--out is not given; name the directory of the comparison")
    algorithms = tuple(name.strip() for name in (options["algorithms"] or "vineppo,ppo,grpo,rloo").split(","))
    spec = CompareSpec(
        recipe=recipe,
        algorithms=algorithms,
        seeds=count(request, "seeds", 5),
        budget=parse_budget(options["budget"] or "updates=96"),
        out=options["out"],
        jobs=count(request, "jobs", 1),
        overrides=tuple(f"--{key}={value}" for key, value in request.overrides.items()),
    )
    for algorithm in algorithms:  # a mistake is told now, not by the first run that meets it
        _training_config(recipe, {**request.overrides, **settings_of_budget(spec.budget)}, algorithm)
    return 1 if compare(spec)["missing"] else 0


def _training_recipes() -> list[str]:
    return [name for name in recipe_names() if not is_sft_recipe(name)]


# --- plan -------------------------------------------------------------------------------------------------------------


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", metavar="NAME", help="plan for accelerators such as h100 or 8xh100, from their data sheet"
    )
    parser.add_argument("--response_tokens", metavar="N", help="with --gpu: mean response length")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file as well")
    _add_recipe_note(parser, f"RECIPE (default: {DEFAULT_RECIPE})", sft=False)
    add_settings(parser, Config)


def _plan(request: Request) -> int:
    config, target = _training_config(request.positional or DEFAULT_RECIPE, request.overrides), _json_target(request)
    from vineppo.plan import plan, report

    length = count(request, "response_tokens", 0)
    if length < 0 or (length and not request.options["gpu"]):
        raise UserError(f"--response_tokens {length} is refused; it is a number above 0, and goes with --gpu")
    made = plan(config, gpu=request.options["gpu"], response_tokens=length or None)
    print("\n".join(report(made, config)))
    _write_json(target, made.as_dict())
    return 0


# --- doctor -----------------------------------------------------------------------------------------------------------


def _no_options(parser: argparse.ArgumentParser) -> None:
    """The command has none but --help."""


def _doctor(request: Request) -> int:
    import importlib.resources
    import platform
    from importlib.metadata import PackageNotFoundError, version

    rows = {"vineppo": _version(), "python": platform.python_version(), "platform": platform.platform()}
    for name in (*_PACKAGES, *_EXTRAS):
        try:
            rows[name] = version(name)
        except PackageNotFoundError:
            rows[name] = "not installed" + (" (optional)" if name in _EXTRAS else "")
    rows["cores"] = str(os.cpu_count())
    rows["device"] = _devices()
    models = importlib.resources.files("vineppo") / "models"
    names = sorted(item.name for item in models.iterdir() if item.is_dir()) if models.is_dir() else []
    rows["models"] = ", ".join(f"embedded:{name}" for name in names) or "none is installed"
    rows["recipes"] = ", ".join(recipe_names())
    for name, value in rows.items():
        print(f"{name:<14} {value}")
    return 0


def _devices() -> str:
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    bfloat16 = "fast" if cpu_multiplies(torch.bfloat16) else "slow, use float32"
    cpu = f"cpu ({torch.get_num_threads()} threads; bfloat16: {bfloat16})"
    cuda = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ", ".join([cpu, *cuda])


# --- the commands -----------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Command] = {
    "train": Command(
        purpose="Train a language model by reinforcement learning; settings come from a recipe and from options.",
        takes="RECIPE",
        usage="[RECIPE] [--KEY VALUE ...]  |  --resume RUN",
        options=_train_options,
        run=_train,
        config=Config,
        examples=(
            ("VinePPO on the embedded default", "vineppo train"),
            ("the same problems with PPO, another seed", "vineppo train judgement --algorithm ppo --run.seed 1"),
            (
                "your own model and problems",
                "vineppo train mine.yaml --model.path org/name --task.name dataset --task.train_path train.jsonl",
            ),
            ("go on with a run that was stopped", "vineppo train --resume runs/judgement-vineppo-seed0"),
        ),
    ),
    "sft": Command(
        purpose="Fine-tune a model on demonstrations: a task's own, or the columns of a JSON-lines file.",
        takes="RECIPE",
        usage="[RECIPE] [--KEY VALUE ...]",
        options=_sft_options,
        run=_sft,
        config=SFTConfig,
        examples=(
            ("rebuild the embedded model", "vineppo sft sft-judgement --out models/judgement"),
            (
                "imitate the answer column of a file",
                "vineppo sft --model.path org/name --task.name dataset --task.train_path demos.jsonl --out models/mine",
            ),
        ),
    ),
    "eval": Command(
        purpose="Measure a model: greedy, pass@1 as a mean over samples, and pass@k, with 95% bootstrap intervals.",
        takes="MODEL",
        usage="MODEL [--KEY VALUE ...]",
        options=_eval_options,
        run=_eval,
        config=EvalSpec,
        examples=(
            ("the embedded model on its task", "vineppo eval embedded:judgement"),
            ("what a run has learned, on 512 test problems", "vineppo eval runs/demo --num_problems 512"),
            ("where a recipe starts, on validation problems", "vineppo eval my.yaml --split validation"),
            ("pass@1 and pass@4, also as JSON", "vineppo eval runs/demo --num_samples 8 --k 1,4 --json figures.json"),
        ),
    ),
    "plan": Command(
        purpose="Predict tokens, time and memory of a training run before it starts, by a short calibration.",
        takes="RECIPE",
        usage="[RECIPE] [--KEY VALUE ...]",
        options=_plan_options,
        run=_plan,
        config=Config,
        examples=(
            ("the embedded default on this machine", "vineppo plan"),
            ("a recipe of the paper on one H100", "vineppo plan paper/rho1b-math-vineppo --gpu h100"),
        ),
    ),
    "compare": Command(
        purpose="Train several algorithms with several seeds on the same problems and budget; table, CSV, JSON, plots.",
        takes="RECIPE",
        usage="RECIPE --out DIR [--KEY VALUE ...]",
        options=_compare_options,
        run=_compare,
        config=Config,
        examples=(
            (
                "five seeds of four algorithms, 96 updates each",
                "vineppo compare judgement --seeds 5 --budget updates=96 --out runs/compare",
            ),
            (
                "equal generated tokens instead, two runs at a time",
                "vineppo compare habit --algorithms vineppo,grpo --budget tokens=2000000 --jobs 2 --out runs/tokens",
            ),
        ),
    ),
    "demo": Command(
        purpose="Five minutes on two cores: VinePPO on the embedded model and task, then a short report.",
        takes="",
        usage="[--KEY VALUE ...]",
        options=_demo_options,
        run=_demo,
        config=Config,
        examples=(
            ("into runs/demo, or the next free name", "vineppo demo"),
            ("another algorithm on the same problems", "vineppo demo --algorithm grpo"),
        ),
    ),
    "doctor": Command(
        purpose="Print the versions and the machine that figures depend on; put it into a bug report.",
        takes="",
        usage="",
        options=_no_options,
        run=_doctor,
        examples=(
            ("everything", "vineppo doctor"),
            ("one line of it", "vineppo doctor | grep torch"),
        ),
    ),
}
