"""Drafts: completions that take tokens from another context have the policy's distribution, with both samplers."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.sampling.test_sampler import (
    EOS,
    SPECIAL,
    TOKENIZER,
    build_policy,
    flatten,
    prompts_and_states,
    random_ids,
    tokens,
    trainer_logprobs,
)
from tests.world import World, build_world
from vineppo.config.schema import ModelConfig
from vineppo.model.logits import selected_logits
from vineppo.model.policy import Policy
from vineppo.sampling.engine.library import INSTRUCTIONS, EngineError, load
from vineppo.sampling.engine.sampler import EngineSampler
from vineppo.sampling.torch import drafts
from vineppo.sampling.torch.drafts import DraftedSampling
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.sampling.trunks import trunks_of
from vineppo.sampling.version import CurrentSampler
from vineppo.sampling.wrapped import WrappedSampler
from vineppo.seeds import derive_seed
from vineppo.tasks.chain import ChainTask
from vineppo.types import Capabilities, Completion, Draft, Sampler, SampleRequest, UserError

SAMPLERS = ["engine", "torch"]
Tokens = tuple[int, ...]
Case = tuple[Tokens, Tokens, int, Tokens]
"""State, state from which the draft is drawn, `Draft.start`, excluded first tokens."""


def build_sampler(kind: str, policy: Policy, instructions: str | None = None, **options: Any) -> Sampler:
    if kind == "torch":
        return TorchSampler(policy, **options)
    library = load(instructions)
    if library is None:
        pytest.skip("the engine is not built, or this processor cannot run it")
    return EngineSampler(policy, library, **options)


@pytest.fixture(scope="module")
def llama() -> Policy:
    return build_policy()


# The enumerable world.


@cache
def world() -> World:
    return build_world(3)


def completions_given(
    state: Tokens, own: Tokens, draft: Tokens, start: int = 0, excluded: Tokens = (), wrong: bool = False
) -> dict[Tokens, float]:
    """Return the exact probability of every completion of a state with a draft, by recursion over the tokens.

    Args:
        own: the state from which the draft was drawn.
        wrong: draw from p and not from the rest of p behind a token that is not taken.
    """
    table, limit = world().table, world().max_new_tokens - len(state)

    def complete(sofar: Tokens, taken: int | None) -> dict[Tokens, float]:
        if sofar and (sofar[-1] == 0 or len(sofar) == limit):
            return {sofar: 1.0}
        p = table[state + sofar].copy()
        if not sofar:
            p[list(excluded)] = 0
            p /= p.sum()
        nexts: list[tuple[int, float, int | None]]
        if taken is None or len(sofar) < start or taken == len(draft):
            nexts = [(token, p[token], taken) for token in range(len(p))]
        else:
            q, token = table[own + draft[:taken]], draft[taken]
            share = min(1.0, p[token] / q[token])
            rest = p if wrong else np.maximum(p - q, 0)
            rest = rest / rest.sum() if rest.any() else rest
            nexts = [(token, share, taken + 1)]
            nexts += [(other, (1 - share) * rest[other], None) for other in range(len(p))]
        total: defaultdict[Tokens, float] = defaultdict(float)
        for token, probability, position in nexts:
            if probability > 0:
                for rest_of, chance in complete((*sofar, token), position).items():
                    total[rest_of] += probability * chance
        return dict(total)

    return complete((), 0)


def drafts_from(own: Tokens, length: int) -> dict[Tokens, float]:
    """Return every draft of at most `length` tokens from a state, with its probability."""
    drafts: defaultdict[Tokens, float] = defaultdict(float)
    table, letters = world().table, range(5)

    def extend(draft: Tokens, probability: float) -> None:
        if len(draft) == length or (draft and draft[-1] == 0):
            drafts[draft] += probability
            return
        for token in letters:
            extend((*draft, token), probability * table[own + draft][token])

    extend((), 1.0)
    return dict(drafts)


def draft_of(own: Tokens, draft: Tokens, start: int) -> Draft:
    rows = [world().table[own + draft[:i]][token] for i, token in enumerate(draft)]
    return Draft(world().prompt_ids + own, draft, tuple(map(math.log, rows)), start)


CASES: list[Case] = [
    ((2,), (1,), 0, ()),
    ((2,), (1,), 0, (1, 3)),
    ((), (1,), 0, ()),
    ((), (1,), 1, (1,)),
    ((), (3,), 1, ()),
    ((4,), (4,), 0, ()),
    ((4,), (4,), 0, (2,)),
]


def length_of(state: Tokens, own: Tokens, start: int) -> int:
    return world().max_new_tokens - max(len(state) + start, len(own))


def requests_for(case: Case, num_samples: int) -> tuple[list[SampleRequest], list[Tokens]]:
    state, own, start, excluded = case
    drafts = list(drafts_from(own, length_of(state, own, start)))
    requests = [
        SampleRequest(
            world().prompt_ids + state,
            num_samples,
            world().max_new_tokens - len(state),
            derive_seed("drafts", str(case), str(draft)),
            excluded_first=excluded,
            temperature=world().temperature,
            draft=draft_of(own, draft, start),
        )
        for draft in drafts
    ]
    return requests, drafts


def p_value(observed: Counter[Any], expected: dict[Any, float], constraints: int) -> float:
    """P-value of a chi-square test of counts with `constraints` fixed sums.

    Cells with an expected count below 5 are one cell.
    """
    assert not observed.keys() - expected.keys()
    large = {key for key, count in expected.items() if count >= 5}
    pairs = [(observed[key], expected[key]) for key in large]
    rest = (
        sum(n for key, n in observed.items() if key not in large),
        sum(expected.values()) - sum(e for _, e in pairs),
    )
    pairs += [rest] if rest[1] >= 5 else []
    statistic = sum((n - e) ** 2 / e for n, e in pairs)
    freedom = max(1, len(pairs) - constraints)
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2.0)))


@pytest.mark.parametrize("case", CASES)
def test_the_draft_and_the_rest_together_give_the_policy(case: Case) -> None:
    """The recursion, over all drafts: it is the reference for the samplers, and this checks the reference."""
    state, own, start, excluded = case
    marginal: defaultdict[Tokens, float] = defaultdict(float)
    wrong: defaultdict[Tokens, float] = defaultdict(float)
    for draft, probability in drafts_from(own, length_of(state, own, start)).items():
        for total, flag in ((marginal, False), (wrong, True)):
            for completion, chance in completions_given(state, own, draft, start, excluded, flag).items():
                total[completion] += probability * chance
    allowed = 1 - sum(world().table[state][token] for token in excluded)
    exact = {
        o.rollout.response_ids[len(state) :]: o.probability
        for o in world().outcomes
        if o.rollout.response_ids[: len(state)] == state and o.rollout.response_ids[len(state)] not in excluded
    }
    whole = sum(exact.values())
    assert allowed > 0.2
    for completion, probability in exact.items():
        assert marginal[completion] == pytest.approx(probability / whole, abs=1e-12)
    distance = sum(abs(wrong[c] - probability / whole) for c, probability in exact.items()) / 2
    assert distance > 0.01 or state == own


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", SAMPLERS)
def test_completions_given_a_draft_have_the_exact_probabilities(kind: str, case: Case) -> None:
    """A chi-square test with fixed seeds. It would notice if the token in place of a refused one were drawn from p.

    In the draft's own context the two distributions of this token are equal.
    """
    state, own, start, excluded = case
    requests, drafts = requests_for(case, num_samples := 400)
    results = build_sampler(kind, world().policy).sample(requests)
    observed = Counter((d, c.token_ids) for d, group in zip(drafts, results, strict=True) for c in group)
    values = []
    for wrong in (False, True):
        expected = {
            (d, completion): num_samples * chance
            for d in drafts
            for completion, chance in completions_given(state, own, d, start, excluded, wrong).items()
        }
        values.append(p_value(observed, expected, len(drafts)) if observed.keys() <= expected.keys() else 0.0)
    assert values[0] > 1e-3
    assert values[1] < 1e-6 or state == own


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_first_token_is_the_drafts_as_often_as_possible(kind: str) -> None:
    """1 minus the total variation distance; and the marginal of the first token is the policy's."""
    case = ((2,), (1,), 0, ())
    requests, drafts = requests_for(case, num_samples := 500)
    results = build_sampler(kind, world().policy).sample(requests)
    p, q = world().table[(2,)], world().table[(1,)]
    weights = drafts_from((1,), length_of(*case[:3]))
    agrees, marginal = 0.0, np.zeros(5)
    for draft, group in zip(drafts, results, strict=True):
        firsts = np.array([c.token_ids[0] for c in group])
        agrees += weights[draft] * (firsts == draft[0]).mean()
        marginal += weights[draft] * np.bincount(firsts, minlength=5) / num_samples
        assert all(c.accepted >= 1 for c in group if c.token_ids[0] == draft[0] and p[draft[0]] >= q[draft[0]])
    distance = np.abs(p - q).sum() / 2
    assert 0.1 < distance < 0.9
    assert agrees == pytest.approx(1 - distance, abs=0.02)
    assert np.abs(marginal - p).max() < 0.02


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_draft_that_the_sampler_draws_gives_the_policys_distribution(kind: str) -> None:
    """The draft comes from a request, with its log-probabilities; the completion has the policy's probabilities."""
    sampler, w = build_sampler(kind, world().policy), world()
    own = SampleRequest((*w.prompt_ids, 1), 3000, 2, seed=1, temperature=w.temperature)
    requests = [
        SampleRequest(
            (*w.prompt_ids, 2), 1, 2, seed=2, first_sample=i, temperature=w.temperature,
            draft=Draft(own.prompt_ids, c.token_ids, c.logprobs),
        )
        for i, c in enumerate(sampler.sample([own])[0])
    ]  # fmt: skip
    completions = [group[0] for group in sampler.sample(requests)]
    observed = Counter(c.token_ids for c in completions)
    p = {
        o.rollout.response_ids[1:]: o.probability
        for o in w.outcomes
        if o.rollout.response_ids[:1] == (2,) and len(o.rollout.response_ids) > 1
    }
    expected = {key: 3000 * value / sum(p.values()) for key, value in p.items()}
    assert p_value(observed, expected, 1) > 1e-3
    same = np.mean([c.token_ids == r.draft.token_ids for c, r in zip(completions, requests, strict=True) if r.draft])
    independent = sum((n / 3000) ** 2 for n in observed.values())
    assert same > independent + 0.1


# The embedded model.


@cache
def judgement() -> Policy:
    return Policy.load(ModelConfig(path="embedded:judgement"))


def replaced_tokens(kind: str, every: int, num_problems: int = 12) -> tuple[list[SampleRequest], np.ndarray]:
    """Return requests that replace tokens of responses, and the log-probabilities of the replaced tokens.

    The tokens behind a replaced token are the draft. Of the tokens of a response, one in `every` is replaced.
    """
    policy, task = judgement(), ChainTask("judgement", 9)
    prompts = [policy.codec.prompt_ids(task.problem("train", i)) for i in range(num_problems)]
    sampler = build_sampler(kind, policy)
    responses = sampler.sample([SampleRequest(ids, 1, 100, derive_seed("r", i)) for i, ids in enumerate(prompts)])
    requests, logprobs = [], []
    for i, (ids, (response,)) in enumerate(zip(prompts, responses, strict=True)):
        for t in range(i % every, len(response.token_ids) - 1, every):
            before, token, after = response.token_ids[:t], response.token_ids[t], response.token_ids[t + 1 :]
            draft = Draft((*ids, *before, token), after, response.logprobs[t + 1 :], start=1)
            seed = derive_seed("alternative", i, t)
            requests.append(SampleRequest((*ids, *before), 1, 100 - t, seed, t, (token,), draft=draft))
            logprobs.append(response.logprobs[t])
    return requests, np.array(logprobs)


def test_most_tokens_behind_a_replaced_one_are_taken() -> None:
    """78% of the tokens where the replaced token had a probability below 0.95, over 160 problems.

    60% if each place counts with the probability of another token there; most places are certain.
    """
    requests, logprobs = replaced_tokens("engine", 1, num_problems=40)
    results = flatten(build_sampler("engine", judgement()).sample(requests))
    weights = 1 - np.exp(logprobs)
    taken = np.array([c.accepted for c in results])
    lengths = np.array([len(c.token_ids) for c in results])
    open_places = weights > 0.05
    assert taken[open_places].sum() / lengths[open_places].sum() > 0.7
    assert (weights * taken).sum() / (weights * lengths).sum() > 0.5
    for completion, request in zip(results, requests, strict=True):
        assert request.draft is not None
        taken_ids = request.draft.token_ids[: completion.accepted]
        assert completion.token_ids[1 : 1 + completion.accepted] == taken_ids


def test_both_samplers_give_the_same_completions() -> None:
    """The engine's and PyTorch's, and their log-probabilities are the trainer's."""
    requests, replaced = replaced_tokens("engine", every=7)
    results = [flatten(build_sampler(kind, judgement()).sample(requests)) for kind in SAMPLERS]
    assert len(requests) > 100 and sum(c.accepted for c in results[0]) > 1000
    for a, b in zip(*results, strict=True):
        assert (a.token_ids, a.accepted, a.finish_reason) == (b.token_ids, b.accepted, b.finish_reason)
    for request, share, *completions in zip(requests, np.exp(replaced), *results, strict=True):
        expected = trainer_logprobs(judgement(), request.prompt_ids, completions[0], 1.0).double().numpy()
        # The first token is compared where the rest of the probability is not a difference of nearly equal numbers.
        begin = 0 if share < 0.99 else 1
        expected[0] -= math.log1p(-share) if begin == 0 else 0
        for c in completions:
            assert np.abs(np.array(c.logprobs) - expected)[begin:].max(initial=0) < 1e-4


@pytest.mark.parametrize("kind", SAMPLERS)
def test_in_its_own_context_a_draft_is_taken_as_a_whole(kind: str) -> None:
    requests = []
    for request in replaced_tokens(kind, every=9)[0]:
        assert request.draft is not None
        requests.append(
            replace(request, prompt_ids=request.draft.context, excluded_first=(), draft=replace(request.draft, start=0))
        )
    for request, completion in zip(requests, flatten(build_sampler(kind, judgement()).sample(requests)), strict=True):
        assert request.draft is not None and request.draft.token_ids[-1] == judgement().codec.eos_ids[0]
        assert completion.token_ids == request.draft.token_ids
        assert completion.accepted == len(completion.token_ids) and completion.finish_reason == "stop"
        assert np.abs(np.array(completion.logprobs) - request.draft.logprobs).max() < 1e-5


# Everything else that a request may have.


def own_continuation(policy: Policy, context: Tokens, length: int, seed: int, temperature: float = 1.0) -> Completion:
    """A continuation that the PyTorch sampler draws in a context."""
    return TorchSampler(policy).sample([SampleRequest(context, 1, length, seed, temperature=temperature)])[0][0]


def drafted(policy: Policy, temperature: float = 1.0) -> list[SampleRequest]:
    """Requests of all kinds with drafts, and some without."""
    requests = []
    for i, request in enumerate(prompts_and_states(temperature)):
        free = own_continuation(policy, request.prompt_ids, request.max_new_tokens, 900 + i, temperature)
        other = random_ids(3 + i, 70 + i)
        elsewhere = own_continuation(policy, other, 12, 300 + i, temperature)
        behind = Draft(request.prompt_ids + free.token_ids[:1], free.token_ids[1:], free.logprobs[1:], 1)
        foreign = Draft(other, elsewhere.token_ids, elsewhere.logprobs)
        texts = policy.codec.token_texts(free.token_ids)
        stop = "".join(texts[2:4]) or "a"
        requests += [
            replace(request, excluded_first=free.token_ids[:1], draft=behind),
            replace(request, draft=foreign, seed=500 + i),
            replace(request, draft=foreign, excluded_first=foreign.token_ids[:1], seed=600 + i, first_sample=3),
            replace(request, draft=replace(foreign, start=3), seed=700 + i, num_samples=1),
            replace(request, draft=replace(foreign, start=2), max_new_tokens=i, seed=800 + i),
            replace(request, draft=behind, stop=(stop, "7"), response_tokens=2, seed=850 + i),
            replace(request, seed=860 + i),
            replace(request, draft=Draft(other, (), ()), seed=870 + i),
        ]
    return requests


class Reads(TorchDispatchMode):
    """Counts how often a tensor is read, which waits for a GPU: by `item`, `float`, `int`, `bool` and `tolist`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))

    def tolist(self, tensor: torch.Tensor) -> Any:
        self.count += 1
        return TOLIST(tensor)


TOLIST = torch.Tensor.tolist


def test_drafts_wait_for_the_device_equally_often_for_any_number_of_samples(
    llama: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two forward passes score all drafts, and the contexts of those that are not taken. Each is waited for."""
    found: list[tuple[int, int, int]] = []
    take, passes = DraftedSampling._take, [0]

    def scored(*arguments: Any) -> torch.Tensor:
        passes[0] += 1
        return selected_logits(*arguments)

    def counted(sampling: DraftedSampling, samples: Any) -> None:
        reads, passes[0] = Reads(), 0
        with monkeypatch.context() as patch, reads:
            patch.setattr(torch.Tensor, "tolist", lambda tensor: reads.tolist(tensor))
            take(sampling, samples)
        found.append((len(samples), passes[0], reads.count))

    monkeypatch.setattr(drafts, "selected_logits", scored)
    monkeypatch.setattr(DraftedSampling, "_take", counted)
    for samples in (1, 3):
        TorchSampler(llama).sample([replace(request, num_samples=samples) for request in drafted(llama)])
    (few, *of_few), (many, *of_many) = found
    assert many == 3 * few > 100 and of_few == of_many
    assert of_many[0] == 2 and of_many[1] < 10  # transformers reads two tensors in a forward pass


def facts(results: list[list[Completion]]) -> list[tuple[Tokens, int, str]]:
    return [(c.token_ids, c.accepted, c.finish_reason) for c in flatten(results)]


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2"])
def test_requests_of_all_kinds_in_one_call(family: str, temperature: float) -> None:
    policy = build_policy(family)
    requests = drafted(policy, temperature)
    results = build_sampler("engine", policy, threads=3).sample(requests)
    assert facts(results) == facts(build_sampler("torch", policy).sample(requests))
    assert {c.finish_reason for c in flatten(results)} == {"stop", "length"}
    assert sum(c.accepted for c in flatten(results)) > 30
    for request, completions in zip(requests, results, strict=True):
        for completion in completions:
            assert len(completion.token_ids) <= request.max_new_tokens
            assert not set(request.excluded_first) & set(completion.token_ids[:1])
            draft = request.draft or Draft((0,), (), ())
            taken = draft.token_ids[: completion.accepted]
            assert completion.token_ids[draft.start : draft.start + completion.accepted] == taken
            if temperature and not request.excluded_first and completion.token_ids:
                expected = trainer_logprobs(policy, request.prompt_ids, completion, temperature).numpy()
                assert np.abs(np.array(completion.logprobs) - expected).max() < 1e-4
            if temperature == 0:
                assert set(completion.logprobs) <= {0.0}


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_drafted_completions_have_the_same_bits_in_every_batch(llama: Policy, instructions: str) -> None:
    requests = drafted(llama)

    def sampler(**options: Any) -> Sampler:
        return build_sampler("engine", llama, instructions, **options)

    together = sampler().sample(requests)
    others = [SampleRequest(random_ids(n, 50 + n), 5, 25, seed=n) for n in range(1, 12)]
    assert sampler().sample(others + requests)[len(others) :] == together
    assert sampler().sample(requests[::-1])[::-1] == together
    for options in ({"threads": 1}, {"threads": 3}, {"max_rows": 1}, {"max_rows": 5, "threads": 2}):
        assert sampler(**options).sample(requests) == together
    assert [sampler(threads=1).sample([request])[0] for request in requests] == together


def test_little_memory_changes_no_draft(llama: Policy) -> None:
    """The smallest memory that is accepted suffices, for a draft elsewhere and for one behind its prefix."""
    requests = [request for request in drafted(llama) if not request.stop]
    expected = build_sampler("engine", llama, kv_memory=1 << 30).sample(requests)

    def refused(memory: int) -> bool:
        try:
            assert build_sampler("engine", llama, kv_memory=memory, threads=3).sample(requests) == expected
        except UserError as error:
            assert "raise rollouts.kv_memory or lower" in str(error) and "states of drafts" in str(error)
            return True
        return False

    low, high = 1, 1 << 20
    assert refused(low) and not refused(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if refused(middle) else (low, middle)
    assert build_sampler("torch", llama, kv_memory=1 << 15).sample(requests)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_budgets_ends_and_stop_strings_inside_a_draft(llama: Policy, kind: str) -> None:
    """In its own context a draft is taken, so the completion ends where the draft has its end."""
    context = random_ids(6, 4)
    free = next(
        c for seed in itertools.count() if len((c := own_continuation(llama, context, 20, seed)).token_ids) == 20
    )
    draft = Draft(context, free.token_ids, free.logprobs)
    request = SampleRequest(context, 3, 20, seed=5, draft=draft)
    sampler = build_sampler(kind, llama)
    for budget in (1, 7, 20, 24):
        for c in sampler.sample([replace(request, max_new_tokens=budget)])[0]:
            assert c.token_ids[:20] == free.token_ids[:budget] and c.accepted == min(20, budget)
            assert c.finish_reason == "length" or len(c.token_ids) > 20
    texts = llama.codec.token_texts(free.token_ids)
    stop = "".join(texts[4:7])
    ends = next(n for n in range(1, 21) if stop in llama.codec.decode(free.token_ids[:n]))
    for c in sampler.sample([replace(request, stop=(stop,))])[0]:
        assert c.token_ids == free.token_ids[:ends] and c.accepted == ends and c.finish_reason == "stop"
    logprob = float(trainer_logprobs(llama, context + free.token_ids[:5], Completion((EOS,), (0.0,), "stop"), 1.0)[0])
    with_end = replace(
        draft, token_ids=(*free.token_ids[:5], EOS, *free.token_ids[5:9]),
        logprobs=(*free.logprobs[:5], logprob, *free.logprobs[5:9]),
    )  # fmt: skip
    for c in sampler.sample([replace(request, draft=with_end)])[0]:
        assert c.token_ids == (*free.token_ids[:5], EOS) and c.accepted == 6 and c.finish_reason == "stop"


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_greedy_completion_is_the_same_with_every_draft(llama: Policy, kind: str) -> None:
    sampler = build_sampler(kind, llama)
    for i, plain in enumerate(prompts_and_states(0.0)):
        greedy = sampler.sample([replace(plain, num_samples=1)])[0][0]
        n = min(4, len(greedy.token_ids) - 1)
        changed = (*greedy.token_ids[:n], (greedy.token_ids[n] + 1) % 10 + SPECIAL, *greedy.token_ids[n + 1 :])
        draft = Draft(random_ids(3, i), changed, (0.0,) * len(changed))
        for c in sampler.sample([replace(plain, draft=draft)])[0]:
            assert c.token_ids == greedy.token_ids and c.logprobs == greedy.logprobs
            assert c.accepted == (n if changed[n] != greedy.token_ids[n] else n + 1)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_drafted_completions_are_passed_on_once(llama: Policy, kind: str) -> None:
    requests = drafted(llama)
    seen: list[tuple[int, Completion]] = []
    sampler = build_sampler(kind, llama)
    sampler.update_weights(4, lambda: iter(()))
    results = sampler.sample(requests, seen.extend)
    expected = [(i, c) for i, group in enumerate(results) for c in group if requests[i].max_new_tokens]
    assert sorted(seen, key=repr) == sorted(expected, key=repr)
    assert {c.version for c in flatten(results)} == {4}


def test_a_context_that_is_a_trunk_already_is_shared() -> None:
    ids = random_ids(20, 0)
    draft = Draft(ids[:8], ids[8:], (-1.0,) * 12, start=1)
    requests = [SampleRequest(ids[:n], 1, 30, 0, draft=draft) for n in (3, 7)] + [SampleRequest(ids, 1, 4, 0)]
    (trunk,) = trunks_of(requests, range(3))
    assert trunk.token_ids == ids and trunk.drafts == (0, 1) and len(trunk.rows) == 3
    first, second = trunks_of([replace(requests[0], prompt_ids=(5, 6))], [0])
    assert sorted([(first.token_ids, len(first.rows)), (second.token_ids, len(second.rows))]) == sorted(
        [((5, 6), 1), (ids[:19], 0)]
    )
    # A draft that the budget cuts needs less of its context; one behind the budget needs nothing.
    assert {t.token_ids for t in trunks_of([replace(requests[0], max_new_tokens=5)], [0])} == {ids[:11]}
    assert {t.token_ids for t in trunks_of([replace(requests[0], max_new_tokens=1)], [0])} == {ids[:3]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Draft((), (1,), (-1.0,)), "Draft.context is empty; it must have the token ids before the draft"),
        (lambda: Draft((1,), (1, 2), (-1.0,)), "has 2 tokens and Draft.logprobs has 1 numbers; every token needs"),
        (lambda: Draft((1,), (1,), (-1.0,), -1), "Draft.start is -1; it must be 0 or more"),
        (lambda: Draft((1,), (1, 2), (-1.0, 0.5)), r"Draft.logprobs\[1\] is 0.5; a log-probability must be finite"),
        (lambda: Draft((1,), (1,), (-math.inf,)), r"Draft.logprobs\[0\] is -inf; a log-probability must be finite"),
        (lambda: Draft((1,), (1,), (math.nan,)), r"Draft.logprobs\[0\] is nan; a log-probability must be finite"),
    ],
)
def test_a_draft_that_cannot_be_is_refused(make: Callable[[], Draft], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
    assert Draft((1,), (1,), (1e-6,)).start == 0  # rounding


def test_a_sampler_without_drafts_is_not_asked(llama: Policy) -> None:
    class Plain(WrappedSampler):
        @property
        def capabilities(self) -> Capabilities:
            return Capabilities(excluded_first=True, reproducible=True)

        def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
            raise AssertionError

    request = SampleRequest((5,), 1, 4, 0, draft=Draft((5,), (6,), (-1.0,)))
    with pytest.raises(UserError, match="a request has a draft, and Plain does not support drafts; send requests with"):
        CurrentSampler(Plain(TorchSampler(llama)), lambda: 0).sample([request])
    passed_on = CurrentSampler(TorchSampler(llama), lambda: 0)
    assert passed_on.capabilities.drafts and tokens(passed_on.sample([request]))


def test_a_token_of_a_draft_must_be_in_the_vocabulary(llama: Policy) -> None:
    sampler = build_sampler("engine", llama)
    for draft in (Draft((5,), (len(TOKENIZER),), (-1.0,)), Draft((-1,), (5,), (-1.0,))):
        with pytest.raises(EngineError, match="not in the vocabulary"):
            sampler.sample([SampleRequest((5,), 1, 4, 0, draft=draft)])
