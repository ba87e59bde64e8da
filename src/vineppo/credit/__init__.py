"""One small file per algorithm. An algorithm writes per-token credit; the trainer never learns its name."""

from __future__ import annotations

from vineppo.config.schema import Config, VineConfig
from vineppo.credit.bisection import Bisection, bisected_vine_credit
from vineppo.credit.gae import gae_credit
from vineppo.credit.group import grpo_credit, reinforce_credit, rloo_credit
from vineppo.credit.vine import vine_credit, vine_node_credit
from vineppo.model.codec import Codec
from vineppo.model.critic import ValueNetwork
from vineppo.steps import build_splitter
from vineppo.types import CreditFn, Sampler, Task
from vineppo.values import AdaptiveMonteCarlo, MonteCarlo, ReusingMonteCarlo, ValueEstimator


def build_credit(config: Config, codec: Codec, sampler: Sampler, task: Task, critic: ValueNetwork | None) -> CreditFn:
    """Bind the chosen algorithm to what it needs: the one place that knows their names."""
    match config.algorithm:
        case "vineppo":
            plain = MonteCarlo(
                sampler=sampler,
                task=task,
                decode=codec.decode,
                num_mc_rollouts=config.vineppo.num_mc_rollouts,
                max_new_tokens=config.rollouts.max_new_tokens,
                run_seed=config.run.seed,
            )
            return build_vine_credit(config.vineppo, plain, codec)
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


def build_vine_credit(config: VineConfig, plain: MonteCarlo, codec: Codec) -> CreditFn:
    """VinePPO in the form that its settings ask for; the number of continuations is that of `plain`."""
    steps = (build_splitter(config.splitter), codec.token_texts, config.max_states)
    if config.alternatives:
        return vine_node_credit(ReusingMonteCarlo(plain), *steps)
    estimator: ValueEstimator = plain
    if config.reuse:
        estimator = ReusingMonteCarlo(plain)
    elif config.min_mc_rollouts:
        estimator = AdaptiveMonteCarlo(plain, config.min_mc_rollouts, config.decided_width)
    if config.bisection:
        return bisected_vine_credit(
            estimator, *steps, Bisection(config.bisection_level, config.bisection_chance, plain.run_seed)
        )
    return vine_credit(estimator, *steps)
