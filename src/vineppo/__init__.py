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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vineppo.config.load import build_config, config_from_dict, diff_configs, load_recipe
    from vineppo.config.schema import (
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
    from vineppo.training.loop import train
    from vineppo.trl.trainer import VinePPOConfig, VinePPOTrainer
    from vineppo.types import UserError

    __version__: str

_MODULE_OF = {
    "train": "training.loop",
    **dict.fromkeys(("build_config", "config_from_dict", "diff_configs", "load_recipe"), "config.load"),
    "VinePPOTrainer": "trl.trainer",
    "VinePPOConfig": "trl.config",
    "UserError": "types",
    "Config": "config.schema",
    "ModelConfig": "config.schema",
    "LoraConfig": "config.schema",
    "GradingConfig": "config.schema",
    "TaskConfig": "config.schema",
    "RolloutConfig": "config.schema",
    "VineConfig": "config.schema",
    "PPOConfig": "config.schema",
    "GRPOConfig": "config.schema",
    "LearnerConfig": "config.schema",
    "KLConfig": "config.schema",
    "EvalConfig": "config.schema",
    "RunConfig": "config.schema",
    "SFTConfig": "config.schema",
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
        return importlib.import_module("vineppo.run.environment").package_version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vineppo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vineppo.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
