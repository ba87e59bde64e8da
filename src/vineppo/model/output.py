"""Compute the log-probabilities of tokens from hidden states in chunks, so that not all logits are in memory.

The logits of a chunk of hidden states are computed, used and freed. The backward pass computes them again. The output
layer is one matrix product, with or without a bias, and may be followed by a factor and by a soft cap.

Letters in shapes: N hidden states, H numbers of a hidden state, V tokens in the vocabulary, A alternatives, C hidden
states of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from vineppo.model.packing import pack

CHUNK = 1 << 23
"""Number of logits of a chunk (C * V), at least those of one hidden state."""


@dataclass(frozen=True)
class Output:
    """The output layer of a model, and what the model does with the logits."""

    weight: torch.Tensor
    """Shape (V, H)."""
    bias: torch.Tensor | None
    """Shape (V,)."""
    factor: float = 1.0
    """The logits are multiplied by this number."""
    cap: float | None = None
    """If it is given, each logit z is then replaced by cap * tanh(z / cap)."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits as the model computes them, shape (C, V), from hidden states of shape (C, H)."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.factor != 1:
            logits = logits * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


_OPERATIONS: WeakKeyDictionary[Any, tuple[float, float | None] | None] = WeakKeyDictionary()
"""Model -> (factor, cap) of its output layer, or None if they do not give the logits of the model."""


def output_of(model: Any, packed: bool = False) -> Output | None:
    """Return the output layer of a model, or None if its logits cannot be computed from the weight alone.

    They cannot if the layer has adapters or hooks, is no `nn.Linear`, or is followed by other operations than a factor
    and a soft cap that the configuration of the model describes. Whether the described operations give the logits of
    the model is tried on a short sequence, once for each model.

    Args:
        packed: whether the model is in `packed_mode`.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return None
    if model not in _OPERATIONS:
        _OPERATIONS[model] = _tried(model, layer, packed)
    found = _OPERATIONS[model]
    return None if found is None else Output(layer.weight, layer.bias, *found)


def share_operations(model: Any, copy: Any) -> None:
    """Let `output_of` use for a copy of a model what it finds out about the model.

    A copy that is sharded cannot be tried, because all processes would have to try it at the same time.
    """
    output_of(model)
    if model in _OPERATIONS:
        _OPERATIONS[copy] = _OPERATIONS[model]


@torch.no_grad()
def _tried(model: Any, layer: nn.Linear, packed: bool) -> tuple[float, float | None] | None:
    """Return the operations (factor, cap) after the output layer, or None if they do not give the model's logits."""
    config = model.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None) or (1 / divisor if divisor else 1.0)
    operations = (float(factor), getattr(config, "final_logit_softcapping", None))
    hidden = []
    handle = layer.register_forward_pre_hook(lambda _layer, inputs: hidden.append(inputs[0]))
    try:
        row = pack([[token % config.vocab_size for token in range(8)]], layer.weight.device)
        inputs = {"position_ids": row.position_ids, "packing": row} if packed else {}
        expected = model(input_ids=row.token_ids, use_cache=False, **inputs).logits  # (1, 8, V)
    finally:
        handle.remove()
    found = Output(layer.weight, layer.bias, *operations).logits(hidden[0]).to(expected.dtype)
    tolerance = 1e-5 if expected.element_size() >= 4 else 0.01
    same = found.shape == expected.shape and (found - expected).abs().max() <= tolerance * expected.abs().max()
    return operations if same else None


def chunked_scores(
    output: Output,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    alternatives: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute log-probabilities, entropies and variances in chunks.

    Args:
        output: the output layer, whose weight and bias get gradients.
        hidden: the hidden states before the trained tokens, shape (N, H).
        targets: the trained tokens, shape (N,).
        alternatives: (index of the trained token that each alternative replaces, token ids), each of shape (A,).
        temperature: the logits are divided by this number.
    Returns:
        (log-probabilities of the trained tokens and of the alternatives (N + A,), entropies of the distributions (N,),
        variances of the log-probability of a token drawn from each distribution (N,)), float32, in nats. The variances
        have no gradient.
    """
    bias = hidden.new_zeros(0) if output.bias is None else output.bias
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _ChunkedScores.apply(
        hidden, output.weight, bias, output, targets, *alternatives, temperature
    )
    return result


def _chunks(count: int, vocabulary: int) -> Iterator[slice]:
    """Yield the slices of `count` hidden states whose logits are computed together."""
    size = max(1, CHUNK // vocabulary)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class _ChunkedScores(torch.autograd.Function):
    """The function `chunked_scores`. It keeps hidden states, weight and two numbers per row for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        output: Output,
        targets: torch.Tensor,
        places: torch.Tensor,
        ids: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        N, A, kind = len(hidden), len(ids), _float(hidden)
        logprobs, entropies, variances = (hidden.new_empty(n, dtype=kind) for n in (N + A, N, N))
        normalizers = hidden.new_empty(N, dtype=kind)
        for part in _chunks(N, len(weight)):
            logits = output.logits(hidden[part]).to(kind) / temperature  # (C, V)
            normalizers[part] = logits.logsumexp(-1)
            distribution = logits.sub_(normalizers[part, None])  # (C, V)
            logprobs[:N][part] = distribution.gather(-1, targets[part, None]).squeeze(-1)
            chosen = _within(places, part)  # (alternatives of the chunk,)
            logprobs[N + chosen] = distribution[places[chosen] - part.start, ids[chosen]]
            probabilities = distribution.exp()
            entropies[part] = -(probabilities * distribution).sum(-1)
            variances[part] = (probabilities * (distribution + entropies[part, None]).square_()).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, places, ids, normalizers, entropies)
        ctx.output, ctx.temperature = output, temperature
        ctx.mark_non_differentiable(variances)
        return logprobs, entropies, variances

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, places, ids, normalizers, entropies = ctx.saved_tensors
        of_logprobs, of_entropies = gradients[:2]
        output, N, kind = ctx.output, len(hidden), _float(hidden)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=kind) if ctx.needs_input_grad[1] else None
        bias_grad = torch.zeros_like(bias, dtype=kind)
        # The sum of the gradients of a row's log-probabilities, (N,).
        totals = of_logprobs[:N].index_add(0, places, of_logprobs[N:])
        for part in _chunks(N, len(weight)):
            logits = output.logits(hidden[part])  # (C, V)
            distribution = (logits.to(kind) / ctx.temperature).sub_(normalizers[part, None])  # (C, V)
            probabilities = distribution.exp()
            # With z the logits after the division by the temperature: d logprob(y) / dz = (z is y) - p, and
            # d entropy / dz = -p * (log p + entropy).
            grad = distribution.add_(entropies[part, None]).mul_(-of_entropies[part, None]).sub_(totals[part, None])
            grad = grad.mul_(probabilities).scatter_add_(-1, targets[part, None], of_logprobs[:N][part, None])
            chosen = _within(places, part)
            where = (places[chosen] - part.start, ids[chosen])
            grad = grad.index_put_(where, of_logprobs[N + chosen], accumulate=True).mul_(1 / ctx.temperature)
            if output.cap is not None:
                grad = grad * (1 - (logits.to(kind) / output.cap).square())
            grad = grad.mul_(output.factor) if output.factor != 1 else grad
            narrow = grad.to(hidden.dtype)
            hidden_grad[part] = narrow @ weight
            if weight_grad is not None:
                weight_grad += narrow.T @ hidden[part]
            if len(bias):
                bias_grad += grad.sum(0)
        wanted_bias = bias_grad.to(bias.dtype) if len(bias) and ctx.needs_input_grad[2] else None
        return (
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            wanted_bias,
            *(None,) * 5,
        )


def _float(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype in which softmax and sums are computed: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _within(places: torch.Tensor, part: slice) -> torch.Tensor:
    """Return the indices of the alternatives whose place is in a slice of the rows."""
    return ((places >= part.start) & (places < part.stop)).nonzero().squeeze(-1)
