"""Compute how the policy gradient of a response depends on the advantages of its steps, and its error at a budget.

The gradient is that of the output layer, projected to a few hundred random directions. For a token a with hidden state
h and next-token distribution p, the gradient of log p(a) with respect to the output matrix is (one-hot(a) - p) h^T. A
random direction u v^T takes (u . (one-hot(a) - p)) (v . h) of it. The projection is linear, so means, variances and
their ratios are those of the gradient in a random subspace. It needs one forward pass and no backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vineppo.measure.session import Response
from vineppo.model.policy import Policy

DIRECTIONS = 256
"""Number of random directions."""


@torch.no_grad()
def step_gradients(policy: Policy, responses: Sequence[Response], temperature: float, seed: int) -> list[np.ndarray]:
    """Return the gradient of the log-probability of each step, projected to random directions.

    Args:
        policy: the policy.
        responses: the responses.
        temperature: the sampling temperature.
        seed: seed of the directions.
    Returns:
        One array per response, shape (S, DIRECTIONS). The policy gradient of a response is the sum of its rows, each
        times the advantage of its step.
    """
    generator = torch.Generator().manual_seed(seed)
    config = policy.model.config.get_text_config()

    def signs(rows: int) -> torch.Tensor:
        drawn = torch.randint(0, 2, (rows, DIRECTIONS), generator=generator, dtype=torch.int8)
        return (2.0 * drawn - 1).to(policy.device)

    of_tokens, of_hidden = signs(config.vocab_size), signs(config.hidden_size)
    result = []
    for response in responses:
        rollout, start = response.rollout, len(response.rollout.prompt_ids)
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids], device=policy.device)  # (1, T)
        output = policy.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        hidden = output.hidden_states[-1][0, start - 1 : -1].float()  # (T, H)
        probabilities = (output.logits[0, start - 1 : -1].float() / temperature).softmax(-1)  # (T, V)
        errors = of_tokens[ids[0, start:]] - probabilities @ of_tokens  # (T, D)
        rows = (errors * (hidden @ of_hidden) / temperature / DIRECTIONS**0.5).double().cpu().numpy()
        starts = (0, *response.ends[:-1])
        result.append(np.stack([rows[a:b].sum(0) for a, b in zip(starts, response.ends, strict=True)]))
    return result


@dataclass(frozen=True)
class Spread:
    """Parts of the variance of the policy gradient of one response."""

    problems: float
    """Variance of the exact gradient between problems (sum over the directions)."""
    responses: float
    """Variance between responses to a problem, with exact values."""

    def error(self, noise: float, cost: float, group_size: int) -> float:
        """Return the squared error of the mean gradient times the number of tokens that are spent.

        With P problems and G responses each, the variance of the mean gradient is (problems + (responses + noise) / G)
        / P. The cost is P * G * `cost` tokens, so the product does not depend on P.

        Args:
            noise: variance that the noise of the values adds to the gradient of a response.
            cost: generated tokens per response, with its continuations.
            group_size: G.
        """
        return cost * (group_size * self.problems + self.responses + noise)


def spread_of(gradients: np.ndarray, noise: np.ndarray, problems: np.ndarray) -> Spread:
    """Estimate the parts of the variance from one gradient per response.

    Args:
        gradients: gradient of each response with nearly exact values, shape (n, D).
        noise: variance that the remaining noise of the values adds to each of them, shape (n,).
        problems: problem of each response, shape (n,); at least two responses per problem.
    """
    names = np.unique(problems)
    means = np.stack([gradients[problems == name].mean(0) for name in names])
    sizes = np.array([(problems == name).sum() for name in names])
    inner = sum(((gradients[problems == name] - mean) ** 2).sum() for name, mean in zip(names, means, strict=True))
    within = float(inner) / max(1, int((sizes - 1).sum()))
    between = float(((means - means.mean(0)) ** 2).sum()) / max(1, len(names) - 1)
    return Spread(
        problems=max(0.0, between - within * float((1 / sizes).mean())),
        responses=max(0.0, within - float(noise.mean())),
    )


def gradients_of(step_rows: Sequence[np.ndarray], advantages: Sequence[np.ndarray]) -> np.ndarray:
    """Return the gradient of each response from the advantages of its steps, shape (n, D)."""
    return np.stack([a @ rows for rows, a in zip(step_rows, advantages, strict=True)])
