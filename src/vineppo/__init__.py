"""Train language models by reinforcement learning, with an advantage for every reasoning step.

This example trains a model with the algorithm VinePPO and the settings of the recipe `judgement`:

```
import vineppo
config = vineppo.build_config(vineppo.load_recipe("judgement"), "vineppo", {"run.dir": "runs/mine"})
summary = vineppo.train(config)
```

Each public name is imported from its module when it is first used, so that `import vineppo` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vineppo.config.load import diff_configs
    from vineppo.config.recipes import load_recipe
    from vineppo.config.schema import (
        Config,
        CriticConfig,
        EvalConfig,
        GradingConfig,
        GuardConfig,
        KLConfig,
        LearnerConfig,
        LoraConfig,
        ModelConfig,
        RolloutConfig,
        RunConfig,
        SFTConfig,
        TaskConfig,
    )
    from vineppo.config.settings import Settings
    from vineppo.credit.algorithm import Algorithm, CreditParts
    from vineppo.credit.sample import training_sample
    from vineppo.training.configure import build_config, config_from_dict
    from vineppo.trl.config import VinePPOConfig
    from vineppo.trl.trainer import VinePPOTrainer
    from vineppo.types import UserError
    from vineppo.view.trained import train

    __version__: str

_MODULE_OF = {
    "train": "view.trained",
    "VinePPOTrainer": "trl.trainer",
    "VinePPOConfig": "trl.config",
    "build_config": "training.configure",
    "config_from_dict": "training.configure",
    "diff_configs": "config.load",
    "load_recipe": "config.recipes",
    "Algorithm": "credit.algorithm",
    "CreditParts": "credit.algorithm",
    "training_sample": "credit.sample",
    "Settings": "config.settings",
    "UserError": "types",
    "Config": "config.schema",
    "ModelConfig": "config.schema",
    "LoraConfig": "config.schema",
    "GradingConfig": "config.schema",
    "GuardConfig": "config.schema",
    "TaskConfig": "config.schema",
    "RolloutConfig": "config.schema",
    "CriticConfig": "config.schema",
    "LearnerConfig": "config.schema",
    "KLConfig": "config.schema",
    "EvalConfig": "config.schema",
    "RunConfig": "config.schema",
    "SFTConfig": "config.schema",
}
"""Dictionary from each public name to the module that defines the name, relative to this package."""

__all__ = [
    "train",
    "VinePPOTrainer",
    "VinePPOConfig",
    "build_config",
    "config_from_dict",
    "diff_configs",
    "load_recipe",
    "Algorithm",
    "CreditParts",
    "training_sample",
    "Settings",
    "UserError",
    "Config",
    "ModelConfig",
    "LoraConfig",
    "GradingConfig",
    "GuardConfig",
    "TaskConfig",
    "RolloutConfig",
    "CriticConfig",
    "LearnerConfig",
    "KLConfig",
    "EvalConfig",
    "RunConfig",
    "SFTConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module. Python calls this function for names that are not imported yet."""
    if name == "__version__":
        return importlib.import_module("vineppo.run.environment").package_version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vineppo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vineppo.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """Return the names in this module, including public names that are not imported yet."""
    return sorted({*globals(), *__all__})
