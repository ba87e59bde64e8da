"""The sampler's ways to decode: whether their results are equal, and how fast each is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from dev.gpu.equal import agreement
from dev.gpu.part import Cells, Part
from dev.gpu.policies import (
    BOTH,
    DTYPES,
    EMBEDDED,
    QWEN_05B,
    SHARP,
    chain_prompts,
    random_policy,
    random_prompts,
    trained_policy,
)
from dev.gpu.speed import Engine, add_speeds, endless_sampler, engines_of

from vineppo.model.policy import Policy
from vineppo.sampling.torch import attention
from vineppo.sampling.torch.pace import Pace, pace_of
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.types import Completion, SampleRequest


@dataclass(frozen=True)
class Variant:
    """A way in which the sampler decodes."""

    pace: Pace
    fused: bool = True

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Leave fused attention out if the variant does."""
        chosen = attention.fused_on_cuda
        if not self.fused:
            attention.fused_on_cuda = lambda *_: False  # type: ignore[assignment]
        try:
            yield
        finally:
            attention.fused_on_cuda = chosen


def variants(part: Part) -> dict[str, Variant]:
    """Return the ways to compare by name. The first one uses CUDA graphs (`sampler.graph`) and fused attention."""
    usual = pace_of(torch.device(part.device), graph=True)
    if not part.cuda:  # for a test of this program: everything but the capture
        usual = Pace(8, 8, 0.5, fixed=True)
    every = dataclasses.replace(usual, check_every=1)
    without = dataclasses.replace(usual, graph=False)
    return {
        "everything": Variant(usual),
        "no graphs": Variant(without),
        "no graphs, no fixed tensors": Variant(dataclasses.replace(without, fixed=False)),
        "no fused attention": Variant(usual, fused=False),
        "a check at every token": Variant(every),
        "none of these": Variant(dataclasses.replace(every, graph=False, fixed=False), fused=False),
    }


def check_pace(part: Part) -> None:
    """Compare the results and the speed of the sampler's ways to decode."""
    for dtype in BOTH:
        models: dict[str, Callable[[], Policy]] = {
            EMBEDDED: functools.partial(trained_policy, EMBEDDED, part, dtype),
            "random Qwen2, 4 layers": functools.partial(random_policy, part, {**QWEN_05B, **SHARP}, dtype),
        }
        for name, build in models.items():
            part.check(3)
            _compare_variants(part, {"model": name, "dtype": dtype}, build())
            part.clear()
    dtype = "float32" if part.small else "bfloat16"
    part.facts |= {"dtype of the speeds": dtype, "rows per prompt": 8 if not part.small else 2}
    if part.cuda:
        found = {name: attention.fused_on_cuda(torch.device(part.device), DTYPES[name], 64) for name in BOTH}
        part.facts["fused attention agrees with matrix products"] = found
    policy = random_policy(part, QWEN_05B, dtype)
    sizes = (4,) if part.small else (64, 2048, 512)
    limit = min(4.0, part.left() / (2.5 * len(variants(part)) * len(sizes)))
    for rows in sizes:
        engines = {}
        for name, variant in variants(part).items():
            part.check(2)
            sampler = endless_sampler(policy, variant.pace)
            engines[name] = _with_variant(variant, engines_of(part, sampler, rows)["sampler"])
        add_speeds(part, {"model": "0.5B (Qwen2.5)", "rows": rows}, engines, endless_sampler(policy), limit)


def _with_variant(variant: Variant, engine: Engine) -> Engine:
    def run(tokens: int) -> None:
        with variant.used():
            engine(tokens)

    return run


def _compare_variants(part: Part, head: Cells, policy: Policy) -> None:
    """Sample the same requests in every way; add a row for each that compares it with the first."""
    prompts = chain_prompts(policy, 8) if head["model"] == EMBEDDED else random_prompts(policy, 4, 20)
    length = 12 if part.small else 40
    requests = [SampleRequest(ids, 4 + i, length + i, seed=i, temperature=0.8) for i, ids in enumerate(prompts)]
    expected: list[list[Completion]] = []
    for name, variant in variants(part).items():
        part.check(1)
        sampler = TorchSampler(policy, pace=variant.pace)
        with variant.used(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = sampler.sample(requests)
        expected = expected or found
        cells = {
            **head,
            "variant": name,
            **agreement(expected, found),
            "same bits": found == expected,
            "graphs": sampler.steps.captures,
            "warning": "; ".join(str(w.message) for w in caught),
        }
        part.row("compared with everything on", cells)
