"""Every setting, once: nested frozen dataclasses that refuse what cannot work. Imports nothing of ours but the words.

The defaults are the vetted settings of the embedded default task. A field's meaning, unit and reduction stand under it;
`vineppo train --help` prints the same text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vineppo.types import Split, UserError

Algorithm = Literal["vineppo", "ppo", "grpo", "rloo", "reinforce"]
ALGORITHMS: tuple[Algorithm, ...] = ("vineppo", "ppo", "grpo", "rloo", "reinforce")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _at_least(section: str, minimum: float, **values: float) -> None:
    for name, value in values.items():
        key = f"{section}.{name}" if section else name
        _require(value >= minimum, f"{key} is {value}; it must be at least {minimum}")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (peft) in the place of training all weights."""

    r: int = 0
    """Rank of the adapters; 0 trains all weights. The reference of the KL penalty is then the model without adapters,
    and costs no memory."""
    alpha: float = 32.0
    """Scale: the adapters' product counts alpha / r times."""
    dropout: float = 0.0
    """Dropout in front of the adapters, in the forward passes of updates only."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get adapters, such as `q_proj`; `all-linear`: all but the output layer."""

    def __post_init__(self) -> None:
        _at_least("model.lora", 0, r=self.r)
        _require(self.alpha > 0, f"model.lora.alpha is {self.alpha}; it must be above 0")
        _require(0 <= self.dropout < 1, f"model.lora.dropout is {self.dropout}; allowed: 0 to below 1")
        _require(all(self.targets) and bool(self.targets), "model.lora.targets is empty; give names of layers")


@dataclass(frozen=True)
class ModelConfig:
    """Which language model is trained, and how it is held."""

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
    """Let a hub model run its own Python code."""
    attn_implementation: str = ""
    """transformers' attention for training: `sdpa`, `eager`, `flash_attention_2`; empty: transformers' own choice. The
    native sampler brings its own."""
    lora: LoraConfig = field(default_factory=LoraConfig)


TASKS = ("chain", "gsm8k", "math", "dataset")
GYM = "reasoning_gym:"
"""How the names of reasoning-gym's data sets begin."""


@dataclass(frozen=True)
class GradingConfig:
    """Limits of graders that run in processes of their own: `boxed`, `module:function`, reasoning-gym's."""

    workers: int = 2
    """Processes that grade while sampling goes on."""
    seconds: float = 10.0
    """Time that one response may take. Then the process is killed, and the response counts as an error."""
    memory: float = 4.0
    """Gibibytes of address space of each process; 0 is no limit."""
    truncated: bool = False
    """Grade also responses that the length limit cut off. `false`: their reward is 0, as in the VinePPO
    paper. Not for the chain task."""
    max_error_share: float = 0.1
    """The run stops when more than this share of all responses could not be graded (reward 0 meanwhile)."""

    def __post_init__(self) -> None:
        _at_least("task.grading", 1, workers=self.workers)
        _at_least("task.grading", 0, memory=self.memory)
        _require(self.seconds > 0, f"task.grading.seconds is {self.seconds}; it must be above 0")
        _require(
            0 <= self.max_error_share <= 1,
            f"task.grading.max_error_share is {self.max_error_share}; allowed: 0 to 1",
        )


@dataclass(frozen=True)
class TaskConfig:
    """Which problems are asked and how responses are graded."""

    name: str = "chain"
    """`chain`: the embedded chained arithmetic. `gsm8k`, `math`: the benchmarks, from the hub or from files.
    `dataset`: your own table. `reasoning_gym:NAME`: a data set of reasoning-gym, such as `reasoning_gym:chain_sum`."""
    level: Literal["judgement", "habit"] = "judgement"
    """chain: `judgement` (the reliable way to write a step depends on that step) or `habit` (one way is reliable
    everywhere)."""
    num_steps: int = 10
    """chain: number of reasoning steps of each problem; its difficulty."""
    writers: Literal["settled", "wavering"] = "settled"
    """chain, for `vineppo sft`: whose habits the demonstrations show (`vineppo.tasks.chain`)."""
    train_path: str = ""
    """dataset, gsm8k, math: training problems: a .jsonl, .json, .csv or .parquet file, a directory saved by `datasets`,
    or a hub id (`org/name`, `org/name/subset`, `org/name:split`). Empty for gsm8k and math: the hub's."""
    validation_path: str = ""
    """Validation problems, given the same way; empty: the last of the training problems are held out (a tenth, at most
    200; 373 of GSM8K and 500 of MATH, as in the paper)."""
    test_path: str = ""
    """Test problems, given the same way; empty: there is no test split."""
    prompt_column: str = ""
    """dataset, gsm8k, math: column that holds the problem's text, or a conversation as a list of messages. Empty: the
    task's own, for `dataset` that is `prompt`."""
    answer_column: str = ""
    """Column that holds the reference answer. Empty: the task's own, for `dataset` that is `answer`."""
    demonstration_column: str = ""
    """Column with the response to imitate in `vineppo sft`. Empty: the task's own, for `dataset` the answer."""
    demonstrator: str = ""
    """`module:function`, a function fn(prompt, answer, **columns) that writes the response to imitate."""
    prompt_template: str = ""
    """How a prompt is written; `{prompt}` stands for the problem's text. Empty: the task's own, for `dataset` just the
    text."""
    chat_template: bool = False
    """Wrap the prompt as a user's message in the tokenizer's chat template."""
    options: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: settings of the data set, such as `{min_terms: 2, max_terms: 4}`; `size` is the number of training
    problems (10000)."""
    rewards: tuple[str, ...] = ()
    """Reward functions: `exact` (the whole response equals the answer, outer white space aside), `hash` (number after
    the last `####` on both sides), `boxed` (mathematically equal, what the last `\\boxed{}` holds), or
    `module:function`, a function fn(prompts, completions, completion_ids, **columns) -> list of numbers or None, which
    is called with one response at a time in a process of its own. Empty: the task's own, for `dataset` that is
    `exact`."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each of them; empty: 1 each."""
    grading: GradingConfig = field(default_factory=GradingConfig)

    def __post_init__(self) -> None:
        _at_least("task", 1, num_steps=self.num_steps)
        _require(self.num_steps <= 25, f"task.num_steps is {self.num_steps}; chains have at most 25 named variables")
        _require(
            self.name in TASKS or self.name.startswith(GYM),
            f"task.name is {self.name!r}; allowed: {', '.join(TASKS)}, or reasoning_gym:NAME",
        )
        _require(
            not self.prompt_template or "{prompt}" in self.prompt_template,
            f"task.prompt_template is {self.prompt_template!r}; it must contain {{prompt}}",
        )
        _require(
            not self.grading.truncated or self.name != "chain",
            "task.grading.truncated is true, but task.name is chain, where half a response is never right",
        )
        _require(
            not self.demonstrator or self.name != "chain",
            "task.demonstrator is set, but task.name is chain, which has demonstrations of its own (task.writers)",
        )
        _require(
            not self.options or self.name.startswith(GYM),
            f"task.options is for reasoning_gym, but task.name is {self.name}",
        )
        _require(
            not (self.rewards and self.reward_weights) or len(self.reward_weights) == len(self.rewards),
            f"task.reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} task.rewards; give "
            "one for each, or none",
        )


@dataclass(frozen=True)
class RolloutConfig:
    """How many responses are sampled each iteration, and how."""

    num_problems: int = 8
    """P: problems drawn per iteration."""
    group_size: int = 4
    """G: responses sampled per problem."""
    temperature: float = 1.0
    """Sampling temperature of rollouts and MC rollouts, and of the log-probabilities that are trained. There is no
    top_p or top_k in training: the trained distribution would then not be the sampled one."""
    max_new_tokens: int = 120
    """Response budget in tokens. A response that reaches it has reward 0 and no end-of-sequence token."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, beside the end-of-sequence token; the string stays in the response."""
    max_rows: int = 2048
    """Largest number of sequences that the sampler decodes at once; more are cut into waves."""
    kv_memory: float = 4.0
    """Gibibytes that the sampler's keys and values may take; larger work is cut into waves."""

    def __post_init__(self) -> None:
        _require(self.kv_memory > 0, f"rollouts.kv_memory is {self.kv_memory}; it must be above 0 (gibibytes)")
        _at_least("rollouts", 1, num_problems=self.num_problems, group_size=self.group_size, max_rows=self.max_rows)
        _at_least("rollouts", 1, max_new_tokens=self.max_new_tokens)
        _require(self.temperature > 0, f"rollouts.temperature is {self.temperature}; training samples need more than 0")
        _require(all(self.stop), "rollouts.stop contains an empty string; give the text that ends a response")


@dataclass(frozen=True)
class VineConfig:
    """VinePPO: values of intermediate states by Monte-Carlo continuation."""

    num_mc_rollouts: int = 9
    """K: continuations sampled from each state."""
    splitter: str = "newline"
    """How a response is cut into steps: `newline` (a line), `math` (a sentence or line, formulas whole, long pieces
    halved), `tokens:N` (every N tokens), `cutpoints` (behind every fifth token that had a probability below 0.9;
    `cutpoints:N:P` for other numbers), `regex:PATTERN` (behind every match)."""
    reuse: bool = True
    """Let a continuation that follows a response to its next state count as one of that state's K too: unbiased, fewer
    tokens, less noise (docs/algorithms.md). `false`: K fresh ones at every state, as in the paper."""
    alternatives: bool = False
    """Train also on the tokens that continuations chose in the place of the response's own: no further sampling, no
    further forward pass, and credit for every token instead of every step (docs/algorithms.md). Needs `reuse`."""
    min_mc_rollouts: int = 0
    """Adaptive K: begin with this many continuations of a state and go on, doubling them, up to `num_mc_rollouts` while
    the state is undecided; the values stay unbiased (docs/algorithms.md). 0: always K. Needs `reuse: false`."""
    decided_width: float = 0.0
    """Of the 95% Wilson interval of a value at which adaptive K calls the state decided. 0: as wide as K continuations
    leave it where half of them succeed, so that no state is known less well than at fixed K."""
    bisection: bool = False
    """Measure states only where the response was decided: begin with its two ends and halve the stretches whose ends
    differ by more than their noise (docs/algorithms.md). For long chains."""
    bisection_level: float = 0.7
    """Confidence with which the two ends of a stretch must differ for bisection to look inside."""
    bisection_chance: float = 0.0
    """Probability of looking inside of a stretch whose ends do not differ; what it finds counts 1 / chance times, which
    keeps the credit unbiased and makes it noisy. 0 never looks: a bias towards no credit, the least error measured."""
    max_states: int = 0
    """At most this many states of a response are evaluated (0: all). Steps between evaluated states are merged, evenly
    along the response, so that their advantages still telescope. The cuts then depend on the response's whole length,
    which costs the expected gradient a little of its size (docs/algorithms.md)."""

    def __post_init__(self) -> None:
        _at_least("vineppo", 1, num_mc_rollouts=self.num_mc_rollouts)
        _at_least("vineppo", 0, max_states=self.max_states)
        _require(
            self.reuse or not self.alternatives,
            "vineppo.alternatives is true, but vineppo.reuse is false: only continuations that follow the response are "
            "known token by token; set vineppo.reuse true, or vineppo.alternatives false",
        )
        self._check_savings()

    def _check_savings(self) -> None:
        _at_least("vineppo", 0, min_mc_rollouts=self.min_mc_rollouts)
        _require(
            self.min_mc_rollouts <= self.num_mc_rollouts,
            f"vineppo.min_mc_rollouts is {self.min_mc_rollouts}, above vineppo.num_mc_rollouts "
            f"({self.num_mc_rollouts}); adaptive K goes from the first up to the second, 0 turns it off",
        )
        _require(
            not (self.min_mc_rollouts and self.reuse),
            "vineppo.min_mc_rollouts and vineppo.reuse exclude each other: continuations that serve several states "
            "have no K of their own; set vineppo.reuse false, or vineppo.min_mc_rollouts 0",
        )
        _require(
            not (self.bisection and self.alternatives),
            "vineppo.bisection and vineppo.alternatives exclude each other: bisection leaves states without "
            "continuations; set one of them false",
        )
        _require(
            0 <= self.decided_width < 1,
            f"vineppo.decided_width is {self.decided_width}; allowed: 0 (that of K continuations) to below 1",
        )
        _require(
            0 < self.bisection_level < 1,
            f"vineppo.bisection_level is {self.bisection_level}; allowed: above 0, below 1",
        )
        _require(
            0 <= self.bisection_chance <= 1,
            f"vineppo.bisection_chance is {self.bisection_chance}; allowed: 0 to 1",
        )


@dataclass(frozen=True)
class PPOConfig:
    """PPO: credit from a full value network by generalised advantage estimation."""

    gae_lambda: float = 1.0
    """Lambda of GAE; 1 is the Monte-Carlo return minus the value (the paper's setting)."""
    gamma: float = 1.0
    """Discount per token."""
    value_lr: float = 1e-4
    """Learning rate of the value network, which starts as a copy of the policy with a fresh linear head."""
    value_warmup_updates: int = 0
    """Updates over which the value network's learning rate rises from 0."""
    value_head_scale: float = 1.0
    """Standard deviation of that head's weights, in units of 1 / sqrt(hidden size + 1), the reference setting. 0: all
    values start at 0, for models with large last hidden states, where `value/explained_variance` starts far below 0."""
    value_only_iterations: int = 0
    """Iterations at the start in which only the value network learns."""
    value_clip: float = 0.2
    """Value clipping range in reward units; 0 turns it off."""

    def __post_init__(self) -> None:
        _require(0 <= self.gae_lambda <= 1, f"ppo.gae_lambda is {self.gae_lambda}; allowed: 0 to 1")
        _require(0 < self.gamma <= 1, f"ppo.gamma is {self.gamma}; allowed: above 0, at most 1")
        _require(self.value_lr > 0, f"ppo.value_lr is {self.value_lr}; it must be above 0")
        _at_least("ppo", 0, value_warmup_updates=self.value_warmup_updates, value_clip=self.value_clip)
        _at_least("ppo", 0, value_only_iterations=self.value_only_iterations, value_head_scale=self.value_head_scale)


@dataclass(frozen=True)
class GRPOConfig:
    """GRPO: a response's reward against its group's mean."""

    scale_by_std: bool = True
    """Divide by the group's standard deviation (with 1e-4 added); off is the `Dr. GRPO` form."""


@dataclass(frozen=True)
class KLConfig:
    """Penalty on the divergence from the frozen starting model."""

    coefficient: float = 0.0
    """Weight of the penalty; 0 turns it off and the reference model is not loaded."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimate from d = logprob - ref_logprob: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d."""
    place: Literal["loss", "reward"] = "loss"
    """`loss`: a differentiable term of the loss. `reward`: every token's advantage loses the penalty of the tokens from
    it to the response's end."""
    reduction: Literal["sequence_sum", "token_mean"] = "sequence_sum"
    """In the loss: summed over a response's tokens and averaged over responses (the reference's), or averaged over all
    tokens, which is weaker by the mean response length."""
    clamp: float = 10.0
    """Per-token estimates are clamped to [-clamp, clamp]."""
    importance_weighted: bool = False
    """In the loss: every estimate is multiplied by its token's ratio to the old policy, whose gradient counts as well.
    The expected gradient of k1 and k3 is then that of KL(policy || reference) (DeepSeek-V3.2, arXiv 2512.02556; TRL's
    `use_bias_correction_kl`); without it k3's is that of KL(reference || policy)."""

    def __post_init__(self) -> None:
        _at_least("learner.kl", 0, coefficient=self.coefficient)
        _require(self.clamp > 0, f"learner.kl.clamp is {self.clamp}; it must be above 0")
        _require(
            not (self.place == "loss" and self.estimator == "k1" and self.coefficient > 0) or self.importance_weighted,
            "learner.kl.estimator is k1, whose expected gradient in the loss is 0; take k2, k3, place reward or "
            "importance_weighted",
        )


@dataclass(frozen=True)
class LearnerConfig:
    """From credit to weights: PPO's clipped objective, the same for every algorithm."""

    lr: float = 1e-4
    """Peak learning rate of the policy (AdamW)."""
    warmup_updates: int = 0
    """Updates over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear"] = "constant"
    """After the warm-up: stay, or fall linearly to 0 at the last update."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm, for policy and value network apart; 0 turns it off."""
    epochs: int = 2
    """Passes over each iteration's rollouts."""
    minibatch_size: int = 32
    """Rollouts per update: an epoch has as many updates as minibatches of this many rollouts, whatever the number of
    training samples that the algorithm makes of them."""
    micro_batch_tokens: int = 8192
    """Padded tokens per forward and backward pass. Changes memory and speed, never the result."""
    clip_low: float = 0.2
    """The probability ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The probability ratio is clipped from above at 1 + clip_high."""
    advantage_scaling: Literal["none", "std", "whiten"] = "none"
    """Over all response tokens of an iteration: leave, divide by the standard deviation, or also subtract the mean."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus (token mean)."""
    kl: KLConfig = field(default_factory=KLConfig)

    def __post_init__(self) -> None:
        _require(self.lr >= 0, f"learner.lr is {self.lr}; it must be at least 0")
        _at_least("learner", 1, epochs=self.epochs, minibatch_size=self.minibatch_size)
        _at_least("learner", 1, micro_batch_tokens=self.micro_batch_tokens)
        _at_least("learner", 0, warmup_updates=self.warmup_updates, weight_decay=self.weight_decay)
        _at_least("learner", 0, max_grad_norm=self.max_grad_norm, entropy_coefficient=self.entropy_coefficient)
        _require(0 < self.clip_low <= 1, f"learner.clip_low is {self.clip_low}; allowed: above 0, at most 1")
        _require(self.clip_high > 0, f"learner.clip_high is {self.clip_high}; it must be above 0")


@dataclass(frozen=True)
class EvalConfig:
    """How accuracy is measured on held-out problems."""

    every: int = 10
    """Iterations between measurements on the validation split; 0 measures only before and after training."""
    num_problems: int = 64
    """Problems of each measurement during training (validation split, the same ones every time)."""
    final_num_problems: int = 256
    """Problems of the measurements before and after training; 0 leaves them out."""
    num_samples: int = 1
    """Responses per problem; accuracy is the mean of their rewards."""
    temperature: float = 1.0
    """Sampling temperature of evaluation; 0 is greedy."""
    split: Literal["validation", "test"] = "validation"
    """Split of the measurements before and after training."""

    def __post_init__(self) -> None:
        _at_least("eval", 0, every=self.every, temperature=self.temperature, final_num_problems=self.final_num_problems)
        _at_least("eval", 1, num_problems=self.num_problems, num_samples=self.num_samples)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, how long it lasts, what it keeps."""

    dir: str = ""
    """Run directory, made by the run; empty: `runs/<recipe>-<algorithm>-seed<seed>`."""
    seed: int = 0
    """Every random number is derived from it by address."""
    iterations: int = 60
    """Iterations of sampling, credit and updates."""
    max_updates: int = 0
    """Stop after the iteration that reaches this many updates (0: no such limit). Minibatches for which there was no
    training sample count as well, as in the learning rate's schedule."""
    max_tokens: int = 0
    """Stop after the iteration in which the tokens generated for training reach this number (0: no such limit)."""
    max_seconds: float = 0.0
    """Stop after the iteration in which training time (evaluation not counted) reaches this (0: no such limit)."""
    checkpoint_every: int = 20
    """Iterations between checkpoints; 0 keeps only the one at the end."""
    keep_checkpoints: int = 1
    """Newest checkpoints that are kept."""
    save_rollouts: bool = True
    """Write every rollout with its steps, values and advantages as Parquet."""
    report_to: tuple[str, ...] = ()
    """Trackers beside metrics.jsonl: any of `tensorboard`, `wandb`, `trackio`."""

    def __post_init__(self) -> None:
        _at_least("run", 0, seed=self.seed, max_updates=self.max_updates, max_tokens=self.max_tokens)
        _at_least("run", 0, max_seconds=self.max_seconds, checkpoint_every=self.checkpoint_every)
        _at_least("run", 1, iterations=self.iterations, keep_checkpoints=self.keep_checkpoints)
        unknown = sorted(set(self.report_to) - {"tensorboard", "wandb", "trackio"})
        _require(not unknown, f"run.report_to has {', '.join(unknown)}; allowed: tensorboard, wandb, trackio")


@dataclass(frozen=True)
class Config:
    """A training run, whole."""

    algorithm: Algorithm = "vineppo"
    """Who writes the credit: `vineppo`, `ppo`, `grpo`, `rloo` or `reinforce`. Everything else is shared."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    vineppo: VineConfig = field(default_factory=VineConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _require(self.algorithm in ALGORITHMS, f"algorithm is {self.algorithm!r}; allowed: {', '.join(ALGORITHMS)}")
        if self.algorithm in ("grpo", "rloo"):
            _require(
                self.rollouts.group_size >= 2,
                f"rollouts.group_size is {self.rollouts.group_size}; {self.algorithm} compares the responses of one "
                "problem and needs at least 2",
            )
        if self.algorithm == "reinforce":
            _require(
                self.rollouts.group_size * self.rollouts.num_problems >= 2,
                "reinforce compares the responses of one iteration and needs at least 2; raise rollouts.num_problems",
            )
        unforeseen = [f"run.{name}" for name in ("max_tokens", "max_seconds") if getattr(self.run, name)]
        _require(
            self.learner.decay == "constant" or bool(self.run.max_updates) or not unforeseen,
            f"learner.decay is linear and {' and '.join(unforeseen)} may end the run, so it is unknown "
            "at which update the rate should reach 0; give run.max_updates as well, or use learner.decay constant",
        )
        _require(
            not (self.algorithm == "vineppo" and self.vineppo.alternatives)
            or self.learner.advantage_scaling != "whiten",
            "learner.advantage_scaling is whiten, which gives credit to alternatives that earned none "
            "(vineppo.alternatives); allowed with it: none, std",
        )
        total = self.rollouts.group_size * self.rollouts.num_problems
        _require(
            self.learner.minibatch_size <= total,
            f"learner.minibatch_size is {self.learner.minibatch_size} but an iteration has {total} rollouts "
            "(rollouts.num_problems x rollouts.group_size); lower it",
        )


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on a task's demonstrations or on prompt and answer columns."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to start from; `model.path` may be `new:tiny`, a fresh tiny Llama with the chain task's tokenizer."""
    task: TaskConfig = field(default_factory=TaskConfig)
    out: str = ""
    """Directory the trained model is saved to; it must not exist yet."""
    updates: int = 1000
    """Optimizer updates."""
    batch_size: int = 64
    """Demonstrations per update."""
    micro_batch_tokens: int = 16384
    """Padded tokens per forward and backward pass; never changes the result."""
    lr: float = 1e-3
    """Peak learning rate (AdamW), linear to 0."""
    warmup_fraction: float = 0.03
    """Share of the updates in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_length: int = 2048
    """Longer demonstrations are left out, and counted."""
    seed: int = 0
    """Seed of the weights (for `new:`) and of the order of demonstrations."""

    def __post_init__(self) -> None:
        _require(bool(self.out), "out is empty; name the directory that the trained model is saved to (--out DIR)")
        _at_least("", 1, updates=self.updates, batch_size=self.batch_size, max_length=self.max_length)
        _require(self.lr > 0, f"lr is {self.lr}; it must be above 0")
        _at_least("", 0, seed=self.seed, warmup_fraction=self.warmup_fraction)


@dataclass(frozen=True)
class EvalSpec:
    """What `vineppo eval` measures: pass@1 as a mean over samples, pass@k, and greedy beside them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    split: Split = "test"
    """Problems of `train`, `validation` or `test`."""
    num_problems: int = 256
    """Problems, the first ones of the split; fewer where it has fewer."""
    num_samples: int = 4
    """Responses per problem."""
    temperature: float = 1.0
    """Sampling temperature of pass@1 and pass@k."""
    max_new_tokens: int = 160
    """Response budget in tokens; a response that reaches it counts as wrong."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, beside the end-of-sequence token."""
    k: tuple[int, ...] = ()
    """The k of pass@k, each at most num_samples; empty: num_samples."""
    seed: int = 0
    """Address of the randomness of sampling and of the intervals."""

    def __post_init__(self) -> None:
        _at_least("", 1, num_problems=self.num_problems, num_samples=self.num_samples)
        _at_least("", 1, max_new_tokens=self.max_new_tokens)
        _require(
            self.temperature > 0,
            f"temperature is {self.temperature}; it must be above 0 (greedy is always measured beside it)",
        )
        wrong = [k for k in self.k if not 1 <= k <= self.num_samples]
        _require(not wrong, f"k is {wrong[:1]}; pass@k needs 1 <= k <= num_samples, which is {self.num_samples}")
