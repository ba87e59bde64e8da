"""The settings that all algorithms share, as nested pydantic models with bounds and checks.

The defaults are the tested settings of the embedded default task. The docstring under a field gives its meaning, unit
and reduction; `vineppo train --help` prints it. The settings of an algorithm are defined in its file in `credit/`, and
`with_sections` adds them to the configuration under the algorithm's name.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

from pydantic import Field, create_model

from vineppo.config.settings import Settings, require
from vineppo.types import Split


class LoraConfig(Settings):
    """Low-rank adapters (peft) that are trained instead of all weights."""

    r: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains all weights without adapters. With adapters, the reference of the KL penalty is
    the model with disabled adapters and needs no memory."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapters: their product is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters, in the forward passes of updates only."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get adapters, such as `q_proj`; `all-linear`: all but the output layer."""

    def check(self) -> None:
        """Require at least one name of a layer."""
        require(bool(self.targets) and all(self.targets), "model.lora.targets is empty; give names of layers")


class ModelConfig(Settings):
    """The language model that is trained, and how it is loaded."""

    path: str = "embedded:judgement"
    """A Hugging Face model directory or hub id, or `embedded:judgement` / `embedded:habit` for the tiny models in the
    package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights and of the computation."""
    device: str = "cpu"
    """A torch device: `cpu`, `cuda`, `cuda:0`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own Python code."""
    attn_implementation: str = ""
    """Attention implementation of transformers for training: `sdpa`, `eager`, `flash_attention_2`; empty: the default
    of transformers. The native sampler does not use it."""
    lora: LoraConfig = Field(default_factory=LoraConfig)


TASKS = ("chain", "gsm8k", "math", "dataset")
GYM = "reasoning_gym:"
"""Prefix of the names of reasoning-gym data sets."""


class GradingConfig(Settings):
    """Limits of graders that run in separate processes: `boxed`, `module:function`, reasoning-gym's scorers."""

    workers: int = Field(2, ge=1)
    """Number of grader processes; they run during sampling."""
    seconds: float = Field(10.0, gt=0)
    """Time limit for grading one response. After it the process is killed and the response counts as an error."""
    memory: float = Field(4.0, ge=0)
    """Limit of the address space of each process in gibibytes; 0 means no limit."""
    truncated: bool = False
    """Also grade responses that were cut off by the length limit. `false`: their reward is 0, as in the VinePPO paper.
    Not for the chain task."""
    max_error_share: float = Field(0.1, ge=0, le=1)
    """The run stops when more than this share of all responses could not be graded (their reward is 0 until then)."""


class TaskConfig(Settings):
    """The problems, and how responses are graded."""

    name: str = "chain"
    """`chain`: the embedded chained arithmetic. `gsm8k`, `math`: the benchmarks, from the hub or from files.
    `dataset`: your own table. `reasoning_gym:NAME`: a data set of reasoning-gym, such as `reasoning_gym:chain_sum`."""
    level: Literal["judgement", "habit"] = "judgement"
    """chain: `judgement` (the reliable way to write a step depends on that step) or `habit` (one way is reliable
    everywhere)."""
    num_steps: int = Field(10, ge=1)
    """chain: number of reasoning steps of each problem, which sets the difficulty."""
    writers: Literal["settled", "wavering"] = "settled"
    """chain: writers of the demonstrations for `vineppo sft` (see `vineppo.tasks.chain`)."""
    train_path: str = ""
    """dataset, gsm8k, math: training problems, as a .jsonl, .json, .csv or .parquet file, a directory saved by
    `datasets`, or a hub id (`org/name`, `org/name/subset`, `org/name:split`). Empty: for gsm8k and math the data set
    on the hub."""
    validation_path: str = ""
    """Validation problems, in the same forms. Empty: the last training problems are held out (a tenth, at most 200; for
    GSM8K 373 and for MATH 500, as in the paper)."""
    test_path: str = ""
    """Test problems, in the same forms; empty: there is no test split."""
    prompt_column: str = ""
    """dataset, gsm8k, math: column with the problem's text, or with a conversation as a list of messages. Empty: the
    task's default, which is `prompt` for `dataset`."""
    answer_column: str = ""
    """Column with the reference answer. Empty: the task's default, which is `answer` for `dataset`."""
    demonstration_column: str = ""
    """Column with the response to imitate in `vineppo sft`. Empty: the task's default; for `dataset` the answer."""
    demonstrator: str = ""
    """`module:function`, a function fn(prompt, answer, **columns) that returns the response to imitate."""
    prompt_template: str = ""
    """Text of the prompt, in which `{prompt}` stands for the problem's text. Empty: the task's default; for `dataset`
    the problem's text alone."""
    chat_template: bool = False
    """Format the prompt as a user message with the tokenizer's chat template."""
    options: dict[str, Any] = Field(default_factory=dict)
    """reasoning_gym: settings of the data set, such as `{min_terms: 2, max_terms: 4}`; `size` is the number of training
    problems (10000)."""
    rewards: tuple[str, ...] = ()
    """Reward functions: `exact` (the whole response equals the answer, outer white space ignored), `hash` (the numbers
    after the last `####` of both are equal), `boxed` (the content of the last `\\boxed{}` is mathematically equal), or
    `module:function`, a function fn(prompts, completions, completion_ids, **columns) -> list of numbers or None, which
    is called with one response at a time in a separate process. Empty: the task's default, which is `exact` for
    `dataset`."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward function; empty: 1 each."""
    grading: GradingConfig = Field(default_factory=GradingConfig)

    def check(self) -> None:
        """Reject settings of another task, and lists of different lengths."""
        require(
            self.num_steps <= 25, f"task.num_steps is {self.num_steps}; it must be at most 25 (variables are letters)"
        )
        require(
            self.name in TASKS or self.name.startswith(GYM),
            f"task.name is {self.name!r}; allowed: {', '.join(TASKS)}, or reasoning_gym:NAME",
        )
        require(
            not self.prompt_template or "{prompt}" in self.prompt_template,
            f"task.prompt_template is {self.prompt_template!r}; it must contain {{prompt}}",
        )
        require(
            not self.grading.truncated or self.name != "chain",
            "task.grading.truncated is true, but task.name is chain, where a truncated response is never right",
        )
        require(
            not self.demonstrator or self.name != "chain",
            "task.demonstrator is set, but task.name is chain, which generates its own demonstrations (task.writers)",
        )
        require(
            not self.options or self.name.startswith(GYM),
            f"task.options is for reasoning_gym, but task.name is {self.name}",
        )
        require(
            not (self.rewards and self.reward_weights) or len(self.reward_weights) == len(self.rewards),
            f"task.reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} task.rewards; give "
            "one for each, or none",
        )


class RolloutConfig(Settings):
    """Number of responses per iteration, and how they are sampled."""

    num_problems: int = Field(8, ge=1)
    """P: number of problems per iteration."""
    group_size: int = Field(4, ge=1)
    """G: number of responses per problem."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of sampling (rollouts and MC rollouts) and of the log-probabilities in the loss. There is no top_p or
    top_k in training, because the sampled distribution would differ from the trained one."""
    max_new_tokens: int = Field(120, ge=1)
    """Response budget in tokens. A response that reaches it has reward 0 and no end-of-sequence token."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, in addition to the end-of-sequence token; the string stays in the response."""
    max_rows: int = Field(2048, ge=1)
    """Maximum number of sequences that the sampler decodes at once; more sequences are split into several batches."""
    kv_memory: float = Field(4.0, gt=0)
    """Memory for the sampler's keys and values in gibibytes; batches that need more are split."""

    def check(self) -> None:
        """Reject empty stop strings."""
        require(all(self.stop), "rollouts.stop contains an empty string; give the text that ends a response")


class CriticConfig(Settings):
    """Settings of the value network. Algorithms that need one extend this class."""

    value_lr: float = Field(1e-4, gt=0)
    """Learning rate of the value network, which starts as a copy of the policy with a new linear head."""
    value_warmup_updates: int = Field(0, ge=0)
    """Updates over which the value network's learning rate rises from 0."""
    value_head_scale: float = Field(1.0, ge=0)
    """Standard deviation of the head's initial weights, in units of 1 / sqrt(hidden size + 1). With 0 all values start
    at 0; use it for models with large last hidden states, if `value/explained_variance` starts far below 0."""
    value_only_iterations: int = Field(0, ge=0)
    """Number of iterations at the start in which only the value network is trained."""
    value_clip: float = Field(0.2, ge=0)
    """Clipping range of values in reward units; 0 turns clipping off."""


class KLConfig(Settings):
    """Penalty on the KL divergence from the frozen starting model."""

    coefficient: float = Field(0.0, ge=0)
    """Weight of the penalty; 0 turns it off and the reference model is not loaded."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimate from d = logprob - ref_logprob: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d."""
    place: Literal["loss", "reward"] = "loss"
    """`loss`: the penalty is a differentiable term of the loss. `reward`: the advantage of a token is reduced by the
    penalties of this token and of all later ones."""
    reduction: Literal["sequence_sum", "token_mean"] = "sequence_sum"
    """For `place: loss`. `sequence_sum`: sum over a response's tokens and mean over responses, as in the reference
    code. `token_mean`: mean over all tokens, which is smaller by a factor of the mean response length."""
    clamp: float = Field(10.0, gt=0)
    """Per-token estimates are clamped to [-clamp, clamp]."""
    importance_weighted: bool = False
    """For `place: loss`: multiply every estimate by the token's probability ratio to the old policy, with gradient. The
    expected gradient of k1 and k3 is then that of KL(policy || reference) (DeepSeek-V3.2, arXiv 2512.02556; TRL's
    `use_bias_correction_kl`). Otherwise the expected gradient of k3 is that of KL(reference || policy)."""

    def check(self) -> None:
        """Reject the estimator k1 in the loss, where its expected gradient is 0."""
        require(
            not (self.place == "loss" and self.estimator == "k1" and self.coefficient > 0) or self.importance_weighted,
            "learner.kl.estimator is k1, whose expected gradient in the loss is 0; use k2 or k3, learner.kl.place "
            "reward, or learner.kl.importance_weighted true",
        )


class LearnerConfig(Settings):
    """PPO's clipped objective and the optimizer, the same for every algorithm."""

    lr: float = Field(1e-4, ge=0)
    """Peak learning rate of the policy (AdamW)."""
    warmup_updates: int = Field(0, ge=0)
    """Updates over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or falling linearly to 0 at the end of the run."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient clipping by global norm, for policy and value network separately; 0 turns it off."""
    epochs: int = Field(2, ge=1)
    """Passes over each iteration's rollouts."""
    minibatch_size: int = Field(32, ge=1)
    """Number of rollouts per update. The number of updates per epoch does not depend on how many training samples the
    algorithm creates from the rollouts."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Maximum number of padded tokens per forward and backward pass. Affects memory and speed, not the result."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """The probability ratio is clipped from below at 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The probability ratio is clipped from above at 1 + clip_high."""
    advantage_scaling: Literal["none", "std", "whiten"] = "none"
    """Scaling of advantages over all response tokens of an iteration: `none`, `std` (divide by the standard deviation),
    or `whiten` (also subtract the mean)."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus (mean over tokens)."""
    kl: KLConfig = Field(default_factory=KLConfig)


class EvalConfig(Settings):
    """Measurements of accuracy on held-out problems."""

    every: int = Field(10, ge=0)
    """Number of iterations between measurements on the validation split; 0 measures only before and after training."""
    num_problems: int = Field(64, ge=1)
    """Number of problems of each measurement during training (validation split, always the same problems)."""
    final_num_problems: int = Field(256, ge=0)
    """Number of problems of the measurements before and after training; 0 skips these measurements."""
    num_samples: int = Field(1, ge=1)
    """Number of responses per problem; accuracy is the mean of their rewards."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature of evaluation; 0 is greedy."""
    split: Literal["validation", "test"] = "validation"
    """Split of the measurements before and after training."""


_TRACKERS = ("tensorboard", "wandb", "trackio")


class RunConfig(Settings):
    """Run directory, length of the run, and output files."""

    dir: str = ""
    """Run directory, created by the run; empty: `runs/<recipe>-<algorithm>-seed<seed>`."""
    seed: int = Field(0, ge=0)
    """Seed of all random numbers of the run."""
    iterations: int = Field(60, ge=1)
    """Number of iterations of sampling, credit and updates."""
    max_updates: int = Field(0, ge=0)
    """Stop after the iteration that reaches this number of updates; 0 means no limit. Minibatches without a training
    sample count too, as in the learning-rate schedule."""
    max_tokens: int = Field(0, ge=0)
    """Stop after the iteration in which the tokens generated for training reach this number; 0 means no limit."""
    max_seconds: float = Field(0.0, ge=0)
    """Stop after the iteration in which the training time (without evaluation) reaches this; 0 means no limit."""
    checkpoint_every: int = Field(20, ge=0)
    """Number of iterations between checkpoints; 0 saves only at the start and at the end."""
    keep_checkpoints: int = Field(1, ge=1)
    """Number of checkpoints to keep; older ones are removed."""
    save_rollouts: bool = True
    """Write every rollout with its steps, values and advantages as Parquet."""
    report_to: tuple[str, ...] = ()
    """Trackers that get the metrics in addition to metrics.jsonl: any of `tensorboard`, `wandb`, `trackio`."""

    def check(self) -> None:
        """Reject unknown trackers."""
        unknown = sorted(set(self.report_to) - set(_TRACKERS))
        require(not unknown, f"run.report_to has {', '.join(unknown)}; allowed: {', '.join(_TRACKERS)}")


class Config(Settings):
    """The settings of a training run.

    A resolved configuration also has a section with the settings of its algorithm, under the algorithm's name.
    """

    algorithm: str = "vineppo"
    """Algorithm that computes the credit: `vineppo`, `ppo`, `grpo`, `rloo`, `reinforce`, or `module:object` for your
    own algorithm. The rest of the training is the same for all algorithms."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    rollouts: RolloutConfig = Field(default_factory=RolloutConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    def check(self) -> None:
        """Reject a linear decay of the learning rate if the number of updates is unknown."""
        open_ended = [f"run.{name}" for name in ("max_tokens", "max_seconds") if getattr(self.run, name)]
        require(
            self.learner.decay == "constant" or bool(self.run.max_updates) or not open_ended,
            f"learner.decay is linear and {' and '.join(open_ended)} may end the run, so it is unknown at which update "
            "the rate should reach 0; give run.max_updates as well, or use learner.decay constant",
        )


@functools.cache
def with_sections(**sections: type[Settings]) -> type[Config]:
    """Return the `Config` class with additional sections: that of one algorithm, or several for a help text."""
    fields: dict[str, Any] = {
        name: (section, Field(default_factory=section)) for name, section in sections.items() if section.model_fields
    }
    return create_model("Config", __base__=Config, __doc__=Config.__doc__, __module__=__name__, **fields)


class SFTConfig(Settings):
    """Supervised fine-tuning on a task's demonstrations, or on columns of prompts and responses."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """The model to start from; `model.path` may be `new:tiny`, a new tiny Llama with the chain task's tokenizer."""
    task: TaskConfig = Field(default_factory=TaskConfig)
    out: str = ""
    """Directory for the trained model; it must be new or empty."""
    updates: int = Field(1000, ge=1)
    """Number of optimizer updates."""
    batch_size: int = Field(64, ge=1)
    """Number of demonstrations per update."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Maximum number of padded tokens per forward and backward pass. Affects memory and speed, not the result."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate (AdamW); it falls linearly to 0 after the warm-up."""
    warmup_fraction: float = Field(0.03, ge=0)
    """Fraction of the updates in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_length: int = Field(2048, ge=1)
    """Maximum length of a demonstration in tokens; longer ones are skipped and counted."""
    seed: int = Field(0, ge=0)
    """Seed of the weights (for `new:`) and of the order of demonstrations."""

    def check(self) -> None:
        """Require an output directory."""
        require(bool(self.out), "out is empty; give the directory for the trained model (--out DIR)")


class EvalSpec(Settings):
    """Settings of `vineppo eval`, which measures pass@1 as a mean over samples, pass@k, and greedy decoding."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    split: Split = "test"
    """Split of the problems: `train`, `validation` or `test`."""
    num_problems: int = Field(256, ge=1)
    """Number of problems: the first ones of the split, or all of them if it has fewer."""
    num_samples: int = Field(4, ge=1)
    """Number of responses per problem."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of pass@1 and pass@k; greedy decoding is always measured too."""
    max_new_tokens: int = Field(160, ge=1)
    """Response budget in tokens; a response that reaches it counts as wrong."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, in addition to the end-of-sequence token."""
    k: tuple[int, ...] = ()
    """Values of k for pass@k, each at most num_samples; empty: num_samples."""
    seed: int = 0
    """Seed of sampling and of the intervals."""

    def check(self) -> None:
        """Require at least k samples for pass@k."""
        wrong = [k for k in self.k if not 1 <= k <= self.num_samples]
        require(not wrong, f"k is {wrong[:1]}; pass@k needs 1 <= k <= num_samples, which is {self.num_samples}")
