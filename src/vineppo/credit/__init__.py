"""One small file per algorithm. An algorithm writes per-token credit; the trainer never learns its name."""

from __future__ import annotations

from vineppo.config.schema import Config, VineConfig
from vineppo.credit.bisection import bisected_vine_credit
from vineppo.credit.gae import gae_credit
from vineppo.credit.group import grpo_credit, reinforce_credit, rloo_credit
from vineppo.credit.vine import vine_credit, vine_node_credit
from vineppo.model.critic import ValueNetwork
from vineppo.model.policy import Policy
from vineppo.steps import build_splitter
from vineppo.types import CreditFn, Sampler, Task, UserError
from vineppo.values import MonteCarlo, ReusingMonteCarlo, reusing_or_fresh


def build_credit(config: Config, policy: Policy, sampler: Sampler, task: Task, critic: ValueNetwork | None) -> CreditFn:
    """Bind the chosen algorithm to what it needs: the one place that knows their names."""
    match config.algorithm:
        case "vineppo":
            plain = MonteCarlo(
                sampler=sampler,
                task=task,
                decode=policy.decode,
                num_mc_rollouts=config.vineppo.num_mc_rollouts,
                max_new_tokens=config.rollouts.max_new_tokens,
                run_seed=config.run.seed,
                temperature=config.rollouts.temperature,
                stop=config.rollouts.stop,
            )
            return build_vine_credit(config.vineppo, plain, policy)
        case "ppo":
            assert critic is not None, "PPO comes with a value network"
            return gae_credit(
                critic,
                gamma=config.ppo.gamma,
                gae_lambda=config.ppo.gae_lambda,
                micro_batch_tokens=config.learner.micro_batch_tokens,
            )
        case "grpo":
            return grpo_credit(config.grpo.scale_by_std)
        case "rloo":
            return rloo_credit()
        case "reinforce":
            return reinforce_credit()


def build_vine_credit(config: VineConfig, plain: MonteCarlo, policy: Policy) -> CreditFn:
    """VinePPO in the form that its settings ask for; the number of continuations is that of `plain`."""
    steps = (build_splitter(config.splitter), policy.token_texts, config.max_states)
    if config.alternatives:
        if not plain.sampler.capabilities.excluded_first:
            raise UserError(
                "vineppo.alternatives is true, but this sampler cannot exclude first tokens, which the reuse of "
                "continuations needs; set vineppo.alternatives false, or sample with the native engine"
            )
        return vine_node_credit(ReusingMonteCarlo(plain), *steps)
    estimator = reusing_or_fresh(plain) if config.reuse else plain
    if config.bisection:
        return bisected_vine_credit(estimator, *steps, config.bisection_level)
    return vine_credit(estimator, *steps)
