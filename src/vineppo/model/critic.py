"""Define the value network (critic) of PPO: a language model without its output layer, and a linear head.

Letters in shapes: B sequences, T tokens of the longest sequence, N selected tokens, H numbers of a hidden state.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vineppo.model.clone import clone_model
from vineppo.model.modes import without_dropout
from vineppo.model.policy import Policy
from vineppo.model.sequences import Sequences


class ValueNetwork(nn.Module):
    """Predicts the values of states with a language model without its output layer (the body), and a linear head.

    The body starts as a copy of the policy. If the policy has adapters, the body has separate adapters of the same kind
    and shares the frozen weights with the policy. The head maps a hidden state of the body to one number and has no
    bias.

    Args:
        policy: the policy from which the body is copied.
        seed: seed of the initial weights of the head.
        head_scale: standard deviation of the initial weights of the head, in units of 1 / sqrt(hidden size + 1). The
            PPO settings of the VinePPO paper correspond to 1.
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
        """Predict the value of the state before each selected token.

        Args:
            token_ids: right-padded sequences, shape (B, T).
            loss_mask: True for the N selected tokens, bool, shape (B, T).
        Returns:
            Values in reward units, ordered by row and then by position, float32, shape (N,).
        """
        hidden = self.body(input_ids=token_ids, use_cache=False).last_hidden_state  # (B, T, H)
        select = F.pad(loss_mask[:, 1:], (0, 1))  # (B, T): the position before each selected token
        return self.head(hidden[select].float()).squeeze(-1)  # (N,)

    def of_sequences(self, sequences: Sequences) -> torch.Tensor:
        """Predict the value of the state before each trained token of sequences, in reward units, float32, shape (N,).

        If the sequences are packed, the body must be in `packed_mode`.
        """
        hidden = self.body(**sequences.inputs).last_hidden_state  # (X, Y, H)
        # FSDP2 needs a result that is no view.
        return self.head(sequences.at_trained(hidden).float()).squeeze(-1).clone()  # (N,)


def _body_of(policy: Policy) -> nn.Module:
    """Return a copy of the policy's model without its output layer.

    If the policy has adapters, the copy shares the frozen weights with the policy to save memory.
    """
    model, adapted = policy.model, policy.adapters is not None
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    # The parameters outside the base model are those of the output layer. They are not copied, because the result does
    # not contain this layer.
    shared = [p for p in model.parameters() if id(p) not in inside or (adapted and not p.requires_grad)]
    body: nn.Module = clone_model(model, shared).base_model
    return body
