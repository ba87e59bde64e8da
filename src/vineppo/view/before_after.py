"""Compare one response of the starting model of a run with one of the trained model, with values of their states."""

from __future__ import annotations

from pathlib import Path

from vineppo.config.schema import Config, LoraConfig, ModelConfig
from vineppo.config.settings import replace
from vineppo.model.policy import Policy
from vineppo.sampling.build import build_sampler
from vineppo.tasks import build_task
from vineppo.training.overlong import fit_prompts
from vineppo.training.rollouts import problem_range, sample_groups
from vineppo.types import RolloutGroup, Task
from vineppo.view.measure import Measuring, measured_responses
from vineppo.view.response import Response

NUM_PROBLEMS = 64
"""Number of validation problems among which one is chosen."""
NUM_MC_ROLLOUTS = 32
"""K, the number of continuations with which each value is measured."""


def before_and_after(
    config: Config, trained: Path, num_problems: int = NUM_PROBLEMS
) -> tuple[Response, Response] | None:
    """Return a response of the starting model and one of the trained model to the same problem, or None.

    The problem is the first of the first `num_problems` validation problems to which the trained model's response has
    a higher reward than the starting model's. Both responses are sampled with the same seeds. The values are measured
    with `NUM_MC_ROLLOUTS` continuations that are sampled for this comparison.

    Args:
        config: settings of the run.
        trained: directory of the trained model.
    Returns:
        (response before training, response after training); None if there is no such problem.
    Raises:
        UserError: if one of the models cannot be loaded.
    """
    models = [Policy.load(config.model), Policy.load(_trained(config.model, trained))]
    task = build_task(config.task, models[0].codec.chat_prompt)
    limit = config.rollouts.max_new_tokens
    fit_prompts(task, models[0].codec, limit, config.task.overlong, {"validation": num_problems})
    parts = [_measuring(config, policy, task) for policy in models]
    problems = problem_range(task, "validation", num_problems)
    before, after = (
        sample_groups(
            problems,
            measuring.codec,
            measuring.sampler,
            task,
            group_size=1,
            max_new_tokens=limit,
            temperature=measuring.temperature,
            stop=measuring.stop,
            address=(config.run.seed, "before and after"),
        )
        for measuring in parts
    )
    pair = next(((b, a) for b, a in zip(before, after, strict=True) if _reward(b) < _reward(a)), None)
    if pair is None:
        return None
    first, second = (measured_responses(m, [group])[0] for m, group in zip(parts, pair, strict=True))
    return first, second


def _reward(group: RolloutGroup) -> float:
    """Return the reward of the only rollout of a group; 0 if it has none."""
    return group.rollouts[0].reward or 0.0


def _trained(config: ModelConfig, trained: Path) -> ModelConfig:
    """Return the settings that load the trained model. Its adapters are merged, in float32."""
    dtype = "float32" if (trained / "adapter").is_dir() else config.dtype
    return replace(config, path=str(trained), lora=LoraConfig(), dtype=dtype)


def _measuring(config: Config, policy: Policy, task: Task) -> Measuring:
    engine = config.sampler.engine if config.sampler.engine != "vllm" else "auto"
    sampler = build_sampler(policy, engine, max_rows=config.rollouts.max_rows)
    return Measuring(
        sampler=sampler,
        task=task,
        codec=policy.codec,
        num_mc_rollouts=NUM_MC_ROLLOUTS,
        max_new_tokens=config.rollouts.max_new_tokens,
        seed=config.run.seed,
        temperature=config.rollouts.temperature,
        stop=config.rollouts.stop,
        reuse=sampler.capabilities.excluded_first,
    )
