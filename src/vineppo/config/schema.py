"""All settings that every algorithm shares, each once: nested pydantic models that refuse values that cannot work.

The defaults are the tested settings of the embedded default task. The text under a field gives its meaning, unit and
reduction; `vineppo train --help` prints it. The settings of an algorithm stand in the algorithm's file in `credit/`;
`with_section` adds them to the configuration under the algorithm's name.
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
    """Rank of the adapters; 0 trains all weights. The reference of the KL penalty is then the model without adapters
    and needs no memory."""
    alpha: float = Field(32.0, gt=0)
    """Scale: the adapters' product is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters, in the forward passes of updates only."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get adapters, such as `q_proj`; `all-linear`: all but the output layer."""

    def check(self) -> None:
        """At least one name of a layer."""
        require(bool(self.targets) and all(self.targets), "model.lora.targets is empty; give names of layers")


class ModelConfig(Settings):
    """The language model that is trained, and how it is loaded."""

    path: str = "embedded:judgement"
    """A Hugging Face model directory or hub id, or `embedded:judgement` / `embedded:habit` for the tiny models inside
    the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights and of the computation."""
    device: str = "cpu"
    """A torch device: `cpu`, `cuda`, `cuda:0`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own Python code."""
    attn_implementation: str = ""
    """transformers' attention for training: `sdpa`, `eager`, `flash_attention_2`; empty: transformers' default. The
    native sampler has its own."""
    lora: LoraConfig = Field(default_factory=LoraConfig)


TASKS = ("chain", "gsm8k", "math", "dataset")
GYM = "reasoning_gym:"
"""Prefix of the names of reasoning-gym's data sets."""


class GradingConfig(Settings):
    """Limits of graders that run in separate processes: `boxed`, `module:function`, reasoning-gym's scorers."""

    workers: int = Field(2, ge=1)
    """Number of grader processes; they run while sampling goes on."""
    seconds: float = Field(10.0, gt=0)
    """Time limit for one response. After that the process is killed, and the response counts as a grading error."""
    memory: float = Field(4.0, ge=0)
    """Address space of each process in gibibytes; 0 is no limit."""
    truncated: bool = False
    """Also grade responses that were cut off by the length limit. `false`: their reward is 0, as in the VinePPO paper.
    Not for the chain task."""
    max_error_share: float = Field(0.1, ge=0, le=1)
    """The run stops when more than this share of all responses could not be graded (their reward is 0 until then)."""


class TaskConfig(Settings):
    """Which problems are asked and how responses are graded."""

    name: str = "chain"
    """`chain`: the embedded chained arithmetic. `gsm8k`, `math`: the benchmarks, from the hub or from files.
    `dataset`: your own table. `reasoning_gym:NAME`: a data set of reasoning-gym, such as `reasoning_gym:chain_sum`."""
    level: Literal["judgement", "habit"] = "judgement"
    """chain: `judgement` (the reliable way to write a step depends on that step) or `habit` (one way is reliable
    everywhere)."""
    num_steps: int = Field(10, ge=1)
    """chain: number of reasoning steps of each problem; its difficulty."""
    writers: Literal["settled", "wavering"] = "settled"
    """chain, for `vineppo sft`: which writers made the demonstrations (see `vineppo.tasks.chain`)."""
    train_path: str = ""
    """dataset, gsm8k, math: training problems: a .jsonl, .json, .csv or .parquet file, a directory saved by `datasets`,
    or a hub id (`org/name`, `org/name/subset`, `org/name:split`). Empty for gsm8k and math: the data set of the hub."""
    validation_path: str = ""
    """Validation problems, in the same forms; empty: the last of the training problems are held out (a tenth, at most
    200; 373 of GSM8K and 500 of MATH, as in the paper)."""
    test_path: str = ""
    """Test problems, in the same forms; empty: there is no test split."""
    prompt_column: str = ""
    """dataset, gsm8k, math: column with the problem's text, or with a conversation as a list of messages. Empty: the
    task's own; for `dataset` that is `prompt`."""
    answer_column: str = ""
    """Column with the reference answer. Empty: the task's own; for `dataset` that is `answer`."""
    demonstration_column: str = ""
    """Column with the response to imitate in `vineppo sft`. Empty: the task's own; for `dataset` the answer."""
    demonstrator: str = ""
    """`module:function`, a function fn(prompt, answer, **columns) that returns the response to imitate."""
    prompt_template: str = ""
    """Text of the prompt, in which `{prompt}` stands for the problem's text. Empty: the task's own; for `dataset` just
    the problem's text."""
    chat_template: bool = False
    """Wrap the prompt as a user's message in the tokenizer's chat template."""
    options: dict[str, Any] = Field(default_factory=dict)
    """reasoning_gym: settings of the data set, such as `{min_terms: 2, max_terms: 4}`; `size` is the number of training
    problems (10000)."""
    rewards: tuple[str, ...] = ()
    """Reward functions: `exact` (the whole response equals the answer, outer white space ignored), `hash` (the numbers
    after the last `####` of both are equal), `boxed` (the content of the last `\\boxed{}` is mathematically equal), or
    `module:function`, a function fn(prompts, completions, completion_ids, **columns) -> list of numbers or None, which
    is called with one response at a time in a separate process. Empty: the task's own; for `dataset` that is
    `exact`."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward function; empty: 1 each."""
    grading: GradingConfig = Field(default_factory=GradingConfig)

    def check(self) -> None:
        """Settings that belong to another task, and lists of different lengths."""
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
            "task.grading.truncated is true, but task.name is chain, where half a response is never right",
        )
        require(
            not self.demonstrator or self.name != "chain",
            "task.demonstrator is set, but task.name is chain, which has demonstrations of its own (task.writers)",
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
    """How many responses are sampled in each iteration, and how."""

    num_problems: int = Field(8, ge=1)
    """P: problems drawn per iteration."""
    group_size: int = Field(4, ge=1)
    """G: responses sampled per problem."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of rollouts and MC rollouts, and of the log-probabilities that are trained. There is no
    top_p or top_k in training: the trained distribution would differ from the sampled one."""
    max_new_tokens: int = Field(120, ge=1)
    """Response budget in tokens. A response that reaches it has reward 0 and no end-of-sequence token."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, in addition to the end-of-sequence token; the string stays in the response."""
    max_rows: int = Field(2048, ge=1)
    """Largest number of sequences that the sampler decodes at once; larger work is split."""
    kv_memory: float = Field(4.0, gt=0)
    """Memory for the sampler's keys and values in gibibytes; larger work is split."""

    def check(self) -> None:
        """No empty stop string."""
        require(all(self.stop), "rollouts.stop contains an empty string; give the text that ends a response")


class CriticConfig(Settings):
    """The value network: algorithms that need one extend these settings."""

    value_lr: float = Field(1e-4, gt=0)
    """Learning rate of the value network, which starts as a copy of the policy with a new linear head."""
    value_warmup_updates: int = Field(0, ge=0)
    """Updates over which the value network's learning rate rises from 0."""
    value_head_scale: float = Field(1.0, ge=0)
    """Standard deviation of the head's weights, in units of 1 / sqrt(hidden size + 1), the reference setting. 0: all
    values start at 0, for models with large last hidden states, where `value/explained_variance` starts far below 0."""
    value_only_iterations: int = Field(0, ge=0)
    """Iterations at the start in which only the value network is trained."""
    value_clip: float = Field(0.2, ge=0)
    """Value clipping range in reward units; 0 turns it off."""


class KLConfig(Settings):
    """Penalty on the divergence from the frozen starting model."""

    coefficient: float = Field(0.0, ge=0)
    """Weight of the penalty; 0 turns it off and the reference model is not loaded."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimate from d = logprob - ref_logprob: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d."""
    place: Literal["loss", "reward"] = "loss"
    """`loss`: a differentiable term of the loss. `reward`: the advantage of a token is reduced by the penalties of the
    token and of those after it."""
    reduction: Literal["sequence_sum", "token_mean"] = "sequence_sum"
    """In the loss: summed over a response's tokens and averaged over responses (as in the reference code), or averaged
    over all tokens, which is weaker by the mean response length."""
    clamp: float = Field(10.0, gt=0)
    """Per-token estimates are clamped to [-clamp, clamp]."""
    importance_weighted: bool = False
    """In the loss: multiply every estimate by its token's ratio to the old policy, with its gradient. The expected
    gradient of k1 and k3 is then that of KL(policy || reference) (DeepSeek-V3.2, arXiv 2512.02556; TRL's
    `use_bias_correction_kl`); without it k3's is that of KL(reference || policy)."""

    def check(self) -> None:
        """The estimator k1 has no gradient in the loss."""
        require(
            not (self.place == "loss" and self.estimator == "k1" and self.coefficient > 0) or self.importance_weighted,
            "learner.kl.estimator is k1, whose expected gradient in the loss is 0; take k2, k3, place reward or "
            "importance_weighted",
        )


class LearnerConfig(Settings):
    """From credit to weights: PPO's clipped objective, the same for every algorithm."""

    lr: float = Field(1e-4, ge=0)
    """Peak learning rate of the policy (AdamW)."""
    warmup_updates: int = Field(0, ge=0)
    """Updates over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear"] = "constant"
    """After the warm-up: constant, or linear to 0 at the last update."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient clipping by global norm, for policy and value network separately; 0 turns it off."""
    epochs: int = Field(2, ge=1)
    """Passes over each iteration's rollouts."""
    minibatch_size: int = Field(32, ge=1)
    """Rollouts per update. An epoch makes one update per this many rollouts, whatever the number of training samples
    that the algorithm makes of them."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Padded tokens per forward and backward pass. Changes memory and speed, never the result."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """The probability ratio is clipped from below at 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The probability ratio is clipped from above at 1 + clip_high."""
    advantage_scaling: Literal["none", "std", "whiten"] = "none"
    """Over all response tokens of an iteration: keep the advantages, divide by their standard deviation, or also
    subtract their mean."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus (token mean)."""
    kl: KLConfig = Field(default_factory=KLConfig)


class EvalConfig(Settings):
    """How accuracy is measured on held-out problems."""

    every: int = Field(10, ge=0)
    """Iterations between measurements on the validation split; 0 measures only before and after training."""
    num_problems: int = Field(64, ge=1)
    """Problems of each measurement during training (validation split, the same ones every time)."""
    final_num_problems: int = Field(256, ge=0)
    """Problems of the measurements before and after training; 0 skips them."""
    num_samples: int = Field(1, ge=1)
    """Responses per problem; accuracy is the mean of their rewards."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature of evaluation; 0 is greedy."""
    split: Literal["validation", "test"] = "validation"
    """Split of the measurements before and after training."""


_TRACKERS = ("tensorboard", "wandb", "trackio")


class RunConfig(Settings):
    """Run directory, length of the run, and what is saved."""

    dir: str = ""
    """Run directory, created by the run; empty: `runs/<recipe>-<algorithm>-seed<seed>`."""
    seed: int = Field(0, ge=0)
    """Seed of all random numbers of the run."""
    iterations: int = Field(60, ge=1)
    """Iterations of sampling, credit and updates."""
    max_updates: int = Field(0, ge=0)
    """Stop after the iteration that reaches this many updates (0: no such limit). Minibatches without a training sample
    count too, as in the learning rate's schedule."""
    max_tokens: int = Field(0, ge=0)
    """Stop after the iteration in which the tokens generated for training reach this number (0: no such limit)."""
    max_seconds: float = Field(0.0, ge=0)
    """Stop after the iteration in which training time (without evaluation) reaches this (0: no such limit)."""
    checkpoint_every: int = Field(20, ge=0)
    """Iterations between checkpoints; 0 keeps only the one at the end."""
    keep_checkpoints: int = Field(1, ge=1)
    """Number of newest checkpoints that are kept."""
    save_rollouts: bool = True
    """Write every rollout with its steps, values and advantages as Parquet."""
    report_to: tuple[str, ...] = ()
    """Trackers in addition to metrics.jsonl: any of `tensorboard`, `wandb`, `trackio`."""

    def check(self) -> None:
        """Only known trackers."""
        unknown = sorted(set(self.report_to) - set(_TRACKERS))
        require(not unknown, f"run.report_to has {', '.join(unknown)}; allowed: {', '.join(_TRACKERS)}")


class Config(Settings):
    """A training run.

    A resolved configuration also has a section with the settings of its algorithm, under the algorithm's name.
    """

    algorithm: str = "vineppo"
    """Algorithm that computes the credit: `vineppo`, `ppo`, `grpo`, `rloo`, `reinforce`, or `module:object` for one of
    your own. Everything else is shared."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    rollouts: RolloutConfig = Field(default_factory=RolloutConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    def check(self) -> None:
        """Settings of different sections that contradict each other."""
        open_ended = [f"run.{name}" for name in ("max_tokens", "max_seconds") if getattr(self.run, name)]
        require(
            self.learner.decay == "constant" or bool(self.run.max_updates) or not open_ended,
            f"learner.decay is linear and {' and '.join(open_ended)} may end the run, so it is unknown at which update "
            "the rate should reach 0; give run.max_updates as well, or use learner.decay constant",
        )


@functools.cache
def with_sections(**sections: type[Settings]) -> type[Config]:
    """The class of configurations that also have these sections: that of one algorithm, or several for a help text."""
    fields: dict[str, Any] = {
        name: (section, Field(default_factory=section)) for name, section in sections.items() if section.model_fields
    }
    return create_model("Config", __base__=Config, __doc__=Config.__doc__, __module__=__name__, **fields)


class SFTConfig(Settings):
    """Supervised fine-tuning on a task's demonstrations or on prompt and answer columns."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """The model to start from; `model.path` may be `new:tiny`, a new tiny Llama with the chain task's tokenizer."""
    task: TaskConfig = Field(default_factory=TaskConfig)
    out: str = ""
    """Directory for the trained model; it must not exist yet."""
    updates: int = Field(1000, ge=1)
    """Optimizer updates."""
    batch_size: int = Field(64, ge=1)
    """Demonstrations per update."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens per forward and backward pass; never changes the result."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate (AdamW), linear to 0."""
    warmup_fraction: float = Field(0.03, ge=0)
    """Share of the updates in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    max_length: int = Field(2048, ge=1)
    """Longer demonstrations are skipped, and counted."""
    seed: int = Field(0, ge=0)
    """Seed of the weights (for `new:`) and of the order of demonstrations."""

    def check(self) -> None:
        """A directory to save to."""
        require(bool(self.out), "out is empty; name the directory that the trained model is saved to (--out DIR)")


class EvalSpec(Settings):
    """What `vineppo eval` measures: pass@1 as a mean over samples, pass@k, and greedy decoding."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    split: Split = "test"
    """Problems of `train`, `validation` or `test`."""
    num_problems: int = Field(256, ge=1)
    """Number of problems, the first ones of the split; fewer where it has fewer."""
    num_samples: int = Field(4, ge=1)
    """Responses per problem."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of pass@1 and pass@k; greedy decoding is always measured too."""
    max_new_tokens: int = Field(160, ge=1)
    """Response budget in tokens; a response that reaches it counts as wrong."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, in addition to the end-of-sequence token."""
    k: tuple[int, ...] = ()
    """The k of pass@k, each at most num_samples; empty: num_samples."""
    seed: int = 0
    """Seed of sampling and of the intervals."""

    def check(self) -> None:
        """pass@k needs at least k samples."""
        wrong = [k for k in self.k if not 1 <= k <= self.num_samples]
        require(not wrong, f"k is {wrong[:1]}; pass@k needs 1 <= k <= num_samples, which is {self.num_samples}")
