"""Sample requests with drafts (`types.Draft`) with a sampler that decodes without drafts.

There are three phases:

1. The tokens before the drafts are sampled, together with the requests without drafts.
2. The model scores the prefixes with their drafts. Each sample takes tokens of its draft, up to the first one that its
   random number refuses. Another token is drawn in place of that one.
3. The rest of each sample is sampled as a request of its own, whose prefix ends with the tokens so far.

In the second phase the device is waited for once per forward pass, and not once per sample.

Letters in shapes: B sequences, T tokens, V tokens in the vocabulary, n tokens of a draft.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from vineppo.model.batch import pad
from vineppo.model.logits import selected_logits
from vineppo.sampling.trunks import draft_length, has_stop, response_tail, stop_window
from vineppo.seeds import stream_keys, uniforms
from vineppo.types import Completion, Draft, FinishReason, OnFinished, SampleRequest

SampleRest = Callable[[Sequence[SampleRequest], Sequence[int], OnFinished | None], list[list[Completion]]]
"""Function that samples requests without drafts. Its arguments are the requests, the position of the first new token of
each request, and `on_finished`."""
_TOKENS_AT_ONCE = 1 << 13
"""Maximum number of tokens, padding included, of the sequences that are scored at once."""
_LOGITS_AT_ONCE = 1 << 24
"""Maximum number of logits that are computed at once."""


@dataclass
class _Sample:
    """A sample of a request with a draft: the tokens so far."""

    request: int
    """Index of the request."""
    index: int
    """Index of the sample among the samples of the request."""
    token_ids: list[int]
    logprobs: list[float]
    accepted: int = 0
    finish_reason: FinishReason | None = None
    """None if the sample is not finished."""
    refused: torch.Tensor | None = None
    """Log-probabilities of the vocabulary at the first token of the draft that was not taken, shape (V,); else None."""
    refused_logprob: float = 0.0
    """The log-probability of that token of the draft."""


@dataclass
class DraftedSampling:
    """One call of a sampler with requests of which some have drafts.

    Attributes:
        model: the model, a transformers causal language model.
        eos_ids: ids of the end-of-sequence tokens.
        decode: converts token ids to text.
        device: device of the model.
        version: version of the completions.
        sample_rest: samples requests without drafts.
    """

    model: Any
    eos_ids: Sequence[int]
    decode: Callable[[Sequence[int]], str]
    device: torch.device
    version: int
    sample_rest: SampleRest
    requests: Sequence[SampleRequest] = field(default=(), init=False)

    def sample(self, requests: Sequence[SampleRequest], on_finished: OnFinished | None) -> list[list[Completion]]:
        """Return one list of `num_samples` completions per request, in the order of the requests."""
        self.requests = requests
        heads = self._sample_heads(on_finished)
        samples = [
            _Sample(i, j, list(c.token_ids), list(c.logprobs), 0, self._end(i, c))
            for i, completions in enumerate(heads)
            if draft_length(requests[i])
            for j, c in enumerate(completions)
        ]
        self._take([sample for sample in samples if sample.finish_reason is None])
        ended = [sample for sample in samples if sample.finish_reason]
        if on_finished and ended:
            on_finished([(sample.request, self._completion(sample)) for sample in ended])
        results: list[list[Completion]] = [list(completions) for completions in heads]
        for sample in ended:
            results[sample.request][sample.index] = self._completion(sample)
        rest = [sample for sample in samples if sample.finish_reason is None]
        for sample, completion in zip(rest, self._sample_tails(rest, on_finished), strict=True):
            results[sample.request][sample.index] = completion
        return results

    def _sample_heads(self, on_finished: OnFinished | None) -> list[list[Completion]]:
        """Sample the requests without drafts, and the tokens before the drafts of the others.

        Only the completions of requests without drafts are passed on.
        """
        heads = [
            replace(request, draft=None, max_new_tokens=_draft(request).start)
            if draft_length(request)
            else replace(request, draft=None)
            for request in self.requests
        ]

        def pass_on(finished: Sequence[tuple[int, Completion]]) -> None:
            whole = [(i, completion) for i, completion in finished if not draft_length(self.requests[i])]
            if whole and on_finished:
                on_finished(whole)

        return self.sample_rest(heads, [0] * len(heads), pass_on if on_finished else None)

    def _end(self, request: int, head: Completion) -> FinishReason | None:
        """Return how a sample ended before its draft, or None."""
        if not draft_length(self.requests[request]) or head.finish_reason == "length":
            return None
        return "stop"

    def _completion(self, sample: _Sample, rest: Completion | None = None) -> Completion:
        """Return the completion of a sample, whose last tokens are those of `rest`."""
        return Completion(
            tuple(sample.token_ids) + (rest.token_ids if rest else ()),
            tuple(sample.logprobs) + (rest.logprobs if rest else ()),
            rest.finish_reason if rest else (sample.finish_reason or "length"),
            self.version,
            sample.accepted,
        )

    def _sample_tails(self, samples: Sequence[_Sample], on_finished: OnFinished | None) -> list[Completion]:
        """Sample the rest of unfinished samples, and return their whole completions."""
        tails = []
        for sample in samples:
            request, count = self.requests[sample.request], len(sample.token_ids)
            tails.append(
                replace(
                    request,
                    prompt_ids=request.prompt_ids + tuple(sample.token_ids),
                    num_samples=1,
                    max_new_tokens=request.max_new_tokens - count,
                    response_tokens=request.response_tokens + count,
                    excluded_first=(),
                    first_sample=request.first_sample + sample.index,
                    draft=None,
                )
            )

        def pass_on(finished: Sequence[tuple[int, Completion]]) -> None:
            if on_finished:
                on_finished([(samples[i].request, self._completion(samples[i], rest)) for i, rest in finished])

        positions = [len(sample.token_ids) for sample in samples]
        rests = self.sample_rest(tails, positions, pass_on if on_finished else None)
        return [self._completion(sample, rest) for sample, (rest,) in zip(samples, rests, strict=True)]

    def _take(self, samples: Sequence[_Sample]) -> None:
        """Extend samples by the tokens of their drafts that they take, and by the token after a refused one."""
        # Samples with the same distributions are scored once.
        groups: dict[tuple[object, ...], list[_Sample]] = {}
        for sample in samples:
            request = self.requests[sample.request]
            prefix = request.prompt_ids + tuple(sample.token_ids)
            key = (prefix, _tokens(request), request.temperature, self._excluded(sample))
            groups.setdefault(key, []).append(sample)
        same = list(groups.values())
        prefixes = [self.requests[group[0].request].prompt_ids + tuple(group[0].token_ids) for group in same]
        drafts = [_tokens(self.requests[group[0].request]) for group in same]
        pairs = [(prefix, tokens[:-1]) for prefix, tokens in zip(prefixes, drafts, strict=True)]
        for indices, logits in self._scored(pairs):
            self._accept_all([same[i] for i in indices], logits)
        refused = [sample for sample in samples if sample.refused is not None]
        own = []
        for sample in refused:
            draft = _draft(self.requests[sample.request])
            own.append((draft.context + draft.token_ids[: sample.accepted], ()))
        for indices, logits in self._scored(own):
            self._replace_refused([refused[i] for i in indices], [rows[0] for rows in logits])

    def _accept_all(self, groups: Sequence[Sequence[_Sample]], logits: Sequence[torch.Tensor]) -> None:
        """Take tokens of the drafts as `_accept` does. The device is waited for once, for all samples together.

        Args:
            groups: samples; those of a group have the same distributions.
            logits: the logits of the tokens of the draft of each group, shape (n, V).
        """
        tokens = [_tokens(self.requests[group[0].request]) for group in groups]
        tokens_on_device = self._on_device(tokens)
        excluded = self._on_device([self._excluded(group[0]) for group in groups])
        tables = [
            self._distributions(group[0], rows, ids) for group, rows, ids in zip(groups, logits, excluded, strict=True)
        ]
        # For each token of a draft, its log-probability and the most likely token, shape (n, 2). A token id is exact.
        pairs = [
            torch.stack((table.gather(1, ids[:, None]).squeeze(1), table.argmax(-1).double()), 1)
            for table, ids in zip(tables, tokens_on_device, strict=True)
        ]
        found = iter(torch.cat(pairs).tolist())
        for group, table, ids in zip(groups, tables, tokens, strict=True):
            here, best = zip(*itertools.islice(found, len(ids)), strict=True)
            for sample in group:
                self._accept(sample, here, best, table)

    def _scored(
        self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
        """Yield the logits after the first part of each sequence, and after each token of its second part.

        Args:
            sequences: pairs (first part, second part with n - 1 tokens).
        Yields:
            (indices of some sequences, for each of them its logits of shape (n, V)).
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        order = sorted(range(len(sequences)), key=lambda i: -sum(map(len, sequences[i])))
        while order:
            longest = sum(map(len, sequences[order[0]]))
            rows = max(len(sequences[i][1]) + 1 for i in order)
            size = max(1, min(_TOKENS_AT_ONCE // longest, _LOGITS_AT_ONCE // (rows * vocabulary)))
            some, order = order[:size], order[size:]
            token_ids = pad([first + second for first, second in map(sequences.__getitem__, some)], torch.int64)
            select = torch.zeros(token_ids.shape, dtype=torch.bool)  # (B, T)
            counts = []
            for row, i in enumerate(some):
                first, second = sequences[i]
                select[row, len(first) - 1 : len(first) + len(second)] = True
                counts.append(len(second) + 1)
            logits = selected_logits(self.model, token_ids.to(self.device), select.to(self.device))
            yield some, list(logits.split(counts))

    def _accept(self, sample: _Sample, here: Sequence[float], best: Sequence[float], logprobs: torch.Tensor) -> None:
        """Take the tokens of the draft of a sample, up to the first one that its random number refuses.

        At temperature 0, the tokens that are the most likely ones are taken, and the first other one is replaced.

        Args:
            here: log-probability of each token of the draft.
            best: the most likely token at the place of each token of the draft.
            logprobs: log-probabilities of the vocabulary before each token of the draft, float64, shape (n, V).
        """
        request = self.requests[sample.request]
        draft, first, tokens = _draft(request), len(sample.token_ids), _tokens(request)
        numbers = self._uniforms(sample, range(first, first + len(tokens)))
        for i, token in enumerate(tokens):
            if request.temperature == 0:
                sample.accepted += best[i] == token
                self._append(sample, int(best[i]), 0.0)
                if best[i] != token:
                    return
            elif numbers[i] < _share(here[i], draft.logprobs[i]):
                sample.accepted += 1
                self._append(sample, token, here[i])
            else:
                sample.refused, sample.refused_logprob = logprobs[i].clone(), here[i]
                return
            if sample.finish_reason:
                return

    def _replace_refused(self, samples: Sequence[_Sample], logits: Sequence[torch.Tensor]) -> None:
        """Draw a token in place of the first token of the draft that each sample did not take.

        The device is waited for once, for all samples together.

        Args:
            logits: for each sample, the logits in the draft's own context, shape (V,).
        """
        drafts = [_draft(self.requests[sample.request]) for sample in samples]
        shares = [
            _share(sample.refused_logprob, draft.logprobs[sample.accepted])
            for sample, draft in zip(samples, drafts, strict=True)
        ]
        drawn = [self._drawn_rest(*one) for one in zip(samples, logits, shares, strict=True)]
        found = torch.stack(drawn).tolist()
        for sample, draft, share, (left, token, logprob) in zip(samples, drafts, shares, found, strict=True):
            sample.refused = None
            if left > 0 or share == 0:
                self._append(sample, int(token), logprob)
            else:  # The two distributions are equal except for rounding.
                sample.accepted += 1
                self._append(sample, draft.token_ids[sample.accepted - 1], sample.refused_logprob)

    def _drawn_rest(self, sample: _Sample, logits: torch.Tensor, share: float) -> torch.Tensor:
        """Draw a token from what is left of the probabilities here without those in the draft's own context.

        The device is not waited for. If nothing is left, the token is drawn from the probabilities here.

        Args:
            logits: the logits in the draft's own context, shape (V,).
            share: the probability with which the token of the draft is taken.
        Returns:
            (sum of the probabilities that are left, token, its log-probability), float64, shape (3,).
        """
        request, position, here = self.requests[sample.request], len(sample.token_ids), sample.refused
        assert here is not None
        rest = (self._uniforms(sample, [position])[0] - share) / (1 - share)
        p, q = here.exp(), (logits.double() / request.temperature).softmax(-1)  # (V,)
        weights = (p - q).clamp_min(0)
        left = weights.sum()
        sums = torch.where(left > 0, weights, p).cumsum(0)
        level = torch.nextafter(sums[-1:], torch.zeros_like(sums[-1:])).minimum(rest * sums[-1:])
        token = torch.searchsorted(sums, level, right=True)  # (1,)
        return torch.cat((left[None], token.double(), here.gather(0, token)))

    def _distributions(self, sample: _Sample, logits: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities from which the next tokens of a sample are drawn, float64, shape (n, V).

        Args:
            logits: the logits of the next n tokens, shape (n, V).
            excluded: token ids that have probability 0 at the first of them, on the device.
        """
        scaled = logits.double() / (self.requests[sample.request].temperature or 1)
        if len(excluded):
            scaled[0].index_fill_(0, excluded, float("-inf"))
        return scaled.log_softmax(-1)

    def _excluded(self, sample: _Sample) -> tuple[int, ...]:
        """Return the token ids that the next token of a sample must not be."""
        return () if sample.token_ids else self.requests[sample.request].excluded_first

    def _on_device(self, lists: Sequence[Sequence[int]]) -> Sequence[torch.Tensor]:
        """Copy lists of token ids to the device at once, because each copy waits for the device."""
        flat = torch.tensor([token for ids in lists for token in ids], dtype=torch.int64)
        return flat.to(self.device).split([len(ids) for ids in lists])

    def _uniforms(self, sample: _Sample, positions: Sequence[int]) -> list[float]:
        """Return the random numbers of a sample at some positions."""
        request = self.requests[sample.request]
        key = stream_keys(np.array([request.seed], np.uint64), np.array([request.first_sample + sample.index]))
        return [float(number) for number in uniforms(key[:, None], np.array(positions))[0]]

    def _append(self, sample: _Sample, token: int, logprob: float) -> None:
        """Append a token, and find out whether it ends the sample."""
        request = self.requests[sample.request]
        sample.token_ids.append(token)
        sample.logprobs.append(float(np.float32(logprob)))
        tail = response_tail(request, stop_window(request.stop))
        if token in self.eos_ids or (request.stop and has_stop(self.decode, tail, sample.token_ids, request.stop)):
            sample.finish_reason = "stop"
        elif len(sample.token_ids) >= request.max_new_tokens:
            sample.finish_reason = "length"


def _draft(request: SampleRequest) -> Draft:
    assert request.draft is not None
    return request.draft


def _tokens(request: SampleRequest) -> tuple[int, ...]:
    """Return the tokens of the draft that a completion can take."""
    return _draft(request).token_ids[: draft_length(request)]


def _share(logprob: float, own_logprob: float) -> float:
    """Return the probability min(1, p / q) with which a token of a draft is taken.

    Args:
        logprob: log p, in the completion, in float64.
        own_logprob: log q, in the draft's own context.
    """
    return float(np.exp(min(0.0, float(np.float32(logprob)) - own_logprob)))
