"""Predict the values of states with the value network of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vineppo.config.load import settings_from_layers
from vineppo.config.schema import ModelConfig
from vineppo.credit import find_algorithm
from vineppo.model.critic import ValueNetwork
from vineppo.model.lora import load_trained_state
from vineppo.model.policy import Policy
from vineppo.run.checkpoint import has_checkpoint, latest_checkpoint
from vineppo.run.directory import RunDirectory
from vineppo.run.shards import read_networks
from vineppo.types import UserError
from vineppo.values import State

Critic = Callable[[Sequence[State]], list[float]]
"""Function (states) -> predicted value of each state in reward units."""


def load_critic(path: str | Path, codec_of: Policy) -> Critic:
    """Load the value network in the newest checkpoint of a run.

    Args:
        path: directory of the run.
        codec_of: the policy whose states are valued. Its tokenizer must be that of the run.
    Raises:
        UserError: if the run has no checkpoint, no value network, or another vocabulary.
    """
    run = RunDirectory.open(path, writable=False)
    if not has_checkpoint(run.checkpoints):
        raise UserError(
            f"--critic {path} has no complete checkpoint (`vineppo compare` removes those of finished runs unless "
            "run.keep_checkpoints is set); train a run with `vineppo train`"
        )
    state = read_networks(latest_checkpoint(run.checkpoints))
    if state.get("critic") is None:
        raise UserError(f"--critic {path} has no value network; give a run of an algorithm with one, such as ppo")
    if run.read_record().get("model_in_memory"):
        raise UserError(f"--critic {path} started from a model in memory, so its value network cannot be built again")
    config = settings_from_layers(ModelConfig, [(run.config.get("model", {}), run.source)])
    policy = Policy.load(config)
    if policy.model.config.get_text_config().vocab_size != codec_of.model.config.get_text_config().vocab_size:
        raise UserError(
            f"--critic {path} has another vocabulary than the model; give a run that started from the model"
        )
    load_trained_state(policy.model, state["policy"])
    network = ValueNetwork(policy, seed=0)
    load_trained_state(network, state["critic"])
    network.eval()
    return lambda states: predict(network, states, policy.device)


def has_critic(path: str | Path) -> bool:
    """Return whether a path is the directory of a run whose newest checkpoint has a value network."""
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        return False
    run = RunDirectory.open(folder, writable=False)
    if not has_checkpoint(run.checkpoints):
        return False
    state = read_networks(latest_checkpoint(run.checkpoints))
    return state.get("critic") is not None


def lost_critic(path: str | Path) -> bool:
    """Return whether a path is a finished run of an algorithm with a value network that has no checkpoint any more."""
    if not (Path(path) / "config.yaml").is_file():
        return False
    run = RunDirectory.open(path, writable=False)
    has_network = find_algorithm(str(run.config.get("algorithm"))).needs_critic
    return has_network and run.is_finished and not has_checkpoint(run.checkpoints)


@torch.no_grad()
def predict(network: ValueNetwork, states: Sequence[State], device: torch.device, batch: int = 64) -> list[float]:
    """Return the predicted value of each state.

    The value of a state is read at its last token, as in training.
    """
    values: list[float] = []
    for start in range(0, len(states), batch):
        rows = [state.prompt_ids + state.response_ids for state in states[start : start + batch]]
        # The value of a state is that *before* the next token, so a token is added, which cannot change it.
        length = 1 + max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.int64, device=device)  # (B, T)
        mask = torch.zeros(len(rows), length, dtype=torch.bool, device=device)  # (B, T)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens, device=device)
            mask[row, len(tokens)] = True
        values += network(ids, mask).tolist()
    return values
