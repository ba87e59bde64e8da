"""Helpers for several test modules: small configurations, hashes of weights, gradients, and the public data sets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from matplotlib.figure import Figure

from vineppo.config.schema import (
    Config,
    EvalConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
)
from vineppo.learning.learner import TorchLearner
from vineppo.training.configure import config_class
from vineppo.types import Metrics, TrainingSample

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")
EMPTY_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d494844520000000100000001080000000"
    "03a7e9b550000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)
"""A picture of one pixel."""


def draw_nothing(figure: Figure, path: Path, *, format: str, metadata: dict[str, Any]) -> None:
    """Write a picture of one pixel in place of a figure; replaces `Figure.savefig`."""
    assert figure.axes and format == "png" and metadata == {"Software": None}
    Path(path).write_bytes(EMPTY_PNG)


def known(entries: Sequence[T | None]) -> list[T]:
    """Return the entries, such as values of states or rewards, and fail if one is None."""
    present = [entry for entry in entries if entry is not None]
    assert len(present) == len(entries)
    return present


class SilentReporter:
    """A reporter that does nothing. Base class of reporters in tests."""

    def start(self, sampler: str) -> None:
        pass

    def before_iteration(self, iteration: int) -> None:
        pass

    def phase(self, name: str) -> None:
        pass

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        pass

    def saved(self, iteration: int) -> None:
        pass

    def wants_to_stop(self) -> bool:
        return False

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        pass


def small_config(run_dir: Path, algorithm: str = "vineppo", **sections: Any) -> Config:
    """Return the configuration of a run that takes a few seconds: short problems of the task `chain`, embedded model.

    Args:
        run_dir: the run directory.
        algorithm: name of the algorithm.
        sections: name of a section -> settings to use for this section instead of those of this function.
    """
    values: dict[str, Any] = {
        "model": ModelConfig(path="embedded:judgement"),
        "task": TaskConfig(num_steps=3),
        "rollouts": RolloutConfig(num_problems=4, group_size=4, max_new_tokens=40),
        "learner": LearnerConfig(lr=1e-4, minibatch_size=8, epochs=1, advantage_scaling="std"),
        "eval": EvalConfig(every=2, num_problems=8, final_num_problems=16),
        "run": RunConfig(dir=str(run_dir), iterations=4, checkpoint_every=1),
    }
    if algorithm == "vineppo":
        values["vineppo"] = {"num_mc_rollouts": 2}
    return config_class(algorithm)(algorithm=algorithm, **values | sections)


def weights_hash(directory: Path) -> str:
    """Return the SHA-256 of the weights file in a model directory, in hexadecimal digits."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def data_directory() -> Path | None:
    """Return the directory that contains GSM8K and MATH as JSON lines, or None if it does not exist.

    The environment variable VINEPPO_DATA contains its path. The default is `shared/data` next to the project's root.
    """
    candidates = [Path(os.environ["VINEPPO_DATA"])] if "VINEPPO_DATA" in os.environ else [ROOT.parent / "shared/data"]
    return next((path for path in candidates if path.is_dir()), None)


def update_with_gradient(
    learner: TorchLearner, samples: Sequence[TrainingSample], num_rollouts: int, iteration: int = 1
) -> tuple[torch.Tensor, Metrics]:
    """Call `learner.update`, and record the gradient of its last update before clipping.

    Returns:
        (gradient with respect to all weights of the policy, shape (parameters,), float64; metrics of the iteration).
    """
    optimizer, gradient = learner.optimizer, torch.zeros(0)

    def recording_step(lr: float, max_grad_norm: float) -> float:
        nonlocal gradient
        parameters = (p for p in optimizer.parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        gradient = torch.cat([g.flatten().double() for g in gradients])
        return type(optimizer).step(optimizer, lr, max_grad_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "step", recording_step)
        metrics = learner.update(samples, iteration, num_rollouts)
    return gradient, metrics
