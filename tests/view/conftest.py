"""Short real runs, each trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import small_config
from vineppo.config.schema import RolloutConfig, RunConfig
from vineppo.training.loop import train


def trained(path: Path, algorithm: str, keep: int = 8, **settings: object) -> Path:
    """Train two iterations of 3 problems x 2 responses, and return the run directory."""
    sections = {} if algorithm != "vineppo" else {"vineppo": {"num_mc_rollouts": 5, **settings}}
    config = small_config(
        path,
        algorithm,
        rollouts=RolloutConfig(num_problems=3, group_size=2, max_new_tokens=40),
        run=RunConfig(dir=str(path), iterations=2, checkpoint_every=0, save_continuations=keep),
        learner={"minibatch_size": 6, "epochs": 1},
        eval={"every": 0, "final_num_problems": 0},
        **sections,
    )
    train(config)
    return path


@pytest.fixture(scope="session")
def vineppo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of VinePPO with reused continuations, which are saved for the first 4 rollouts."""
    return trained(tmp_path_factory.mktemp("runs") / "vineppo", "vineppo", keep=4)


@pytest.fixture(scope="session")
def counterfactual_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "counterfactual", "counterfactual", keep=6)
