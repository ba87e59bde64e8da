"""Define the value network of PPO: a language model without output layer (the body), and a linear head."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vineppo.model.clone import clone_model
from vineppo.model.modes import without_dropout
from vineppo.model.policy import Policy


class ValueNetwork(nn.Module):
    """A language model without output layer (the body), with a linear head that predicts values of states.

    The body starts as a copy of the policy without its output layer. The head has no bias. The standard deviation of
    the initial weights of the head is head_scale / sqrt(hidden size + 1); with head_scale 1 this is the initialisation
    in the PPO settings of the VinePPO paper. If the policy has adapters, the body has separate adapters of the same
    kind and shares the frozen weights with the policy.
    """

    def __init__(self, policy: Policy, seed: int, head_scale: float = 1.0):
        super().__init__()
        self.body = _body_of(policy)
        if policy.adapters is None:
            self.body.requires_grad_(True)
        hidden = policy.model.config.get_text_config().hidden_size
        weight = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed))  # (1, H)
        self.head = nn.Linear(hidden, 1, bias=False)
        self.head.weight.data.copy_(weight * (head_scale / (hidden + 1) ** 0.5))
        self.to(policy.device)
        without_dropout(self)

    def forward(self, token_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        """Predict the value of the state before each token selected by `loss_mask`.

        Returns:
            float32 of shape (N,) for the N selected tokens, ordered by row and then by position, in reward units.
        """
        hidden = self.body(input_ids=token_ids, use_cache=False).last_hidden_state  # (B, T, H)
        select = F.pad(loss_mask[:, 1:], (0, 1))  # (B, T)
        return self.head(hidden[select].float()).squeeze(-1)  # (N,)


def _body_of(policy: Policy) -> nn.Module:
    """Copy the policy without its output layer. With adapters, the copy shares the frozen weights to save memory."""
    model, adapted = policy.model, policy.adapters is not None
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    shared = [p for p in model.parameters() if id(p) not in inside or (adapted and not p.requires_grad)]
    body: nn.Module = clone_model(model, shared).base_model
    return body
