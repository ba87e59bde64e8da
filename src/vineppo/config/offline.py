"""Define the settings of `vineppo offline`: the baselines RestEM and DPO-positive."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vineppo.config.schema import EvalConfig, ModelConfig, RolloutConfig, SamplerConfig, TaskConfig
from vineppo.config.settings import Settings, require

METHODS = {"restem": "RestEM", "dpo_positive": "DPO-positive"}
"""Value of `method` -> name of the method in texts and plots. Each has a section of settings of the same name."""


class OfflineRolloutConfig(RolloutConfig):
    """Number of responses per round, and how the responses are sampled."""

    num_problems: int = Field(256, ge=1)
    """P: number of training problems per round. If the training split has fewer, each of them is used once."""
    group_size: int = Field(8, ge=1)
    """G: number of responses per problem."""


class OfflineEvalConfig(EvalConfig):
    """Settings of the evaluation on held-out problems."""

    every: int = Field(1, ge=0)
    """Number of iterations between evaluations on the validation split. An iteration is a round of RestEM or an epoch
    of DPO-positive. If it is 0, the model is evaluated only before and after training."""


class RestEMConfig(Settings):
    """Rounds of sampling and supervised fine-tuning on the right responses (RestEM, arXiv 2312.06585)."""

    rounds: int = Field(3, ge=1)
    """Number of rounds. Each samples with the policy of the round before, and trains the starting model again."""
    max_kept: int = Field(10, ge=1)
    """Maximum number of right responses to a problem that are kept in a round. Of more, a random selection is kept, and
    different texts come before repeated ones."""
    epochs: int = Field(8, ge=1)
    """Number of passes over the kept responses of a round."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """How the loss of an update is reduced to one number. `token_mean`: mean over all tokens, as in `vineppo sft`.
    `sequence_mean`: mean over the tokens of each response, then mean over responses, as in the code of the VinePPO
    paper."""


class DPOPositiveConfig(Settings):
    """Training on pairs of a right and a wrong response (DPO-positive, arXiv 2402.13228)."""

    beta: float = Field(0.1, gt=0)
    """Factor of the log-ratios in the loss. A lower value allows a larger distance from the starting model."""
    penalty: float = Field(50.0, ge=0)
    """Weight of the penalty on a right response that is less probable than in the starting model (lambda in the paper).
    0 gives plain DPO."""
    max_pairs: int = Field(64, ge=1)
    """Maximum number of pairs of a problem. Of more, a random selection is used."""
    epochs: int = Field(3, ge=1)
    """Number of passes over the pairs."""


class OfflineRunConfig(Settings):
    """Run directory and seed."""

    dir: str = ""
    """Run directory, which the run creates. Empty: `runs/<recipe>-<method>-seed<seed>`."""
    seed: int = Field(0, ge=0)
    """Seed from which all random numbers of the run are derived."""
    save_rollouts: bool = True
    """Write every sampled response with its reward to a Parquet file."""


class OfflineConfig(Settings):
    """Settings of `vineppo offline`, which trains on responses that were sampled and graded before."""

    method: Literal["restem", "dpo_positive"] = "restem"
    """`restem`: rounds of sampling, each followed by supervised fine-tuning of the starting model on the right
    responses. `dpo_positive`: one round of sampling, then training on pairs of a right and a wrong response."""
    reward_threshold: float = 1.0
    """Smallest reward of a right response."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate (optimizer AdamW). After the warm-up, the learning rate falls linearly to 0: in RestEM at the
    end of each round, in DPO-positive at the end of the run."""
    warmup_fraction: float = Field(0.03, ge=0, le=1)
    """Fraction of the updates in which the learning rate rises linearly from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moments of AdamW."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Maximum global norm of the gradient. Larger gradients are clipped; 0 turns clipping off."""
    batch_size: int = Field(64, ge=1)
    """Number of kept responses (RestEM) or pairs (DPO-positive) per update."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Maximum number of tokens per forward and backward pass, with padding. It affects memory and speed, not the
    result."""
    restem: RestEMConfig = Field(default_factory=RestEMConfig)
    dpo_positive: DPOPositiveConfig = Field(default_factory=DPOPositiveConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    rollouts: OfflineRolloutConfig = Field(default_factory=OfflineRolloutConfig)
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    eval: OfflineEvalConfig = Field(default_factory=OfflineEvalConfig)
    run: OfflineRunConfig = Field(default_factory=OfflineRunConfig)

    @property
    def epochs(self) -> int:
        """Number of passes over the examples of a round, for the chosen method."""
        return self.restem.epochs if self.method == "restem" else self.dpo_positive.epochs

    @property
    def iterations(self) -> int:
        """Number of iterations: rounds of RestEM, or epochs of DPO-positive."""
        return self.restem.rounds if self.method == "restem" else self.dpo_positive.epochs

    def check(self) -> None:
        """Raise UserError for a group without pairs, for dropout, and for values that AdamW does not accept."""
        require(
            self.method != "dpo_positive" or self.rollouts.group_size >= 2,
            f"rollouts.group_size is {self.rollouts.group_size}; dpo_positive compares right and wrong responses to "
            "one problem and needs at least 2; raise rollouts.group_size",
        )
        require(
            self.model.lora.dropout == 0,
            f"model.lora.dropout is {self.model.lora.dropout:g}, but `vineppo offline` trains without dropout; set "
            "model.lora.dropout to 0",
        )
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"betas is {list(self.betas)}; each value must be at least 0 and below 1",
        )
