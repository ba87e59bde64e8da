"""Reinforcement learning for language models that gives every reasoning step the credit it earned.

```
import vineppo
config = vineppo.build_config(vineppo.load_recipe("judgement"), "vineppo", {"run.dir": "runs/mine"})
summary = vineppo.train(config)
```

Everything is loaded when it is first asked for, so that `import vineppo` is quick.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vineppo.config import (
        Config,
        EvalConfig,
        GradingConfig,
        GRPOConfig,
        KLConfig,
        LearnerConfig,
        LoraConfig,
        ModelConfig,
        PPOConfig,
        RolloutConfig,
        RunConfig,
        SFTConfig,
        TaskConfig,
        VineConfig,
    )
    from vineppo.settings import build_config, config_from_dict, diff_configs, load_recipe
    from vineppo.train import train
    from vineppo.trainer import VinePPOConfig, VinePPOTrainer
    from vineppo.types import UserError

    __version__: str

_MODULE_OF = {
    "train": "train",
    **dict.fromkeys(("build_config", "config_from_dict", "diff_configs", "load_recipe"), "settings"),
    **dict.fromkeys(("VinePPOTrainer", "VinePPOConfig"), "trainer"),
    "UserError": "types",
    "Config": "config",
    "ModelConfig": "config",
    "LoraConfig": "config",
    "GradingConfig": "config",
    "TaskConfig": "config",
    "RolloutConfig": "config",
    "VineConfig": "config",
    "PPOConfig": "config",
    "GRPOConfig": "config",
    "LearnerConfig": "config",
    "KLConfig": "config",
    "EvalConfig": "config",
    "RunConfig": "config",
    "SFTConfig": "config",
}

__all__ = [
    "train",
    "VinePPOTrainer",
    "VinePPOConfig",
    "build_config",
    "config_from_dict",
    "diff_configs",
    "load_recipe",
    "UserError",
    "Config",
    "ModelConfig",
    "LoraConfig",
    "GradingConfig",
    "TaskConfig",
    "RolloutConfig",
    "VineConfig",
    "PPOConfig",
    "GRPOConfig",
    "LearnerConfig",
    "KLConfig",
    "EvalConfig",
    "RunConfig",
    "SFTConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vineppo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vineppo.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Of the installed package; a source tree that was never installed is the version being worked on."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vineppo")
    except PackageNotFoundError:
        return "0.1.0"


class _Package(ModuleType):
    """`vineppo.train` is the function, also after the module of that name was imported.

    Importing a submodule sets it as an attribute of its package; this property lets that pass without effect.
    """

    @property
    def train(self) -> Any:
        """The function `train` of the module `vineppo.train`."""
        return importlib.import_module("vineppo.train").train

    @train.setter
    def train(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
