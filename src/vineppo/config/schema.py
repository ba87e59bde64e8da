"""Define the settings that all algorithms share, as nested pydantic models with bounds and checks.

The default values are tested with the default task, `chain`. The docstring below a field gives its meaning and unit;
`vineppo train --help` prints this docstring. A section is a field whose value is another model, such as `learner`. The
settings of a single algorithm are defined in the module of the algorithm in `vineppo.credit`, and `with_sections` adds
them to `Config` as a section with the name of the algorithm.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Literal

from pydantic import Field, create_model

from vineppo.config.messages import did_you_mean
from vineppo.config.settings import Settings, require
from vineppo.types import Split

_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "xla", "mtia")
"""Types of PyTorch devices on which a model can be trained."""


class LoraConfig(Settings):
    """Low-rank adapters (peft) that are trained instead of all weights."""

    r: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains all weights without adapters. With adapters, the reference model of the KL penalty
    is the same model with its adapters disabled, which needs no additional memory."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapters: the product of the two low-rank matrices is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the input of the adapters. Dropout is active only in the forward passes of updates, not in
    sampling."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get adapters, such as `q_proj`. `all-linear` means all linear layers except the output
    layer."""

    def check(self) -> None:
        """Raise UserError if `targets` is empty or contains an empty name."""
        require(
            bool(self.targets) and all(self.targets),
            "model.lora.targets is empty or contains an empty name; give names of layers",
        )


class ModelConfig(Settings):
    """The language model that is trained, and how it is loaded."""

    path: str = "embedded:judgement"
    """A Hugging Face model directory or hub id, or one of the small models included in the package:
    `embedded:judgement`, `embedded:wording`, `embedded:habit`. It can also be the directory of a run, for its final
    model (or the model in its newest checkpoint, if the run did not finish), or a checkpoint, such as
    `runs/a/checkpoints/000020`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights and of the computation."""
    device: str = "cpu"
    """A PyTorch device: `cpu`, `cuda`, `cuda:N` for the GPU with number N, `mps` or `xpu`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and takes more time."""
    trust_remote_code: bool = False
    """Allow the Python code of a hub model to run."""
    attn_implementation: str = ""
    """Attention implementation of transformers in training, such as `sdpa`, `eager` or `flash_attention_2`. Empty: the
    default of transformers. The sampler does not use this setting."""
    lora: LoraConfig = Field(default_factory=LoraConfig)

    def check(self) -> None:
        """Raise UserError if `device` is not the name of a device."""
        kind = self.device.partition(":")[0].lower()
        meant = "cuda" if kind in ("gpu", "nvidia", "rocm", "hip", "amd") or kind.isdecimal() else ""
        hint = f"did you mean {meant}?" if meant else did_you_mean(kind, _DEVICES)
        require(
            re.fullmatch(rf"({'|'.join(_DEVICES)})(:\d+)?", self.device) is not None,
            f"model.device is {self.device!r}; {hint + ' ' if hint else ''}allowed: {', '.join(_DEVICES)}, with a "
            "number after a colon for one of several, such as cuda:0",
        )


TASKS = ("chain", "gsm8k", "math", "dataset")
"""Values of `task.name`, apart from the data sets of reasoning-gym."""
MAX_WEIGHTS = 1000.0
"""Largest sum of the magnitudes of `task.reward_weights`."""
GYM = "reasoning_gym:"
"""Prefix of `task.name` for a data set of reasoning-gym, such as `reasoning_gym:chain_sum`."""

_SET_BY_THE_TASK = (
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
)
"""Arguments of `apply_chat_template` and variables of every template that are not allowed in
`task.chat_template_kwargs`."""


class GradingConfig(Settings):
    """Grader processes and their limits, and the treatment of truncated responses and of grading errors."""

    workers: int = Field(2, ge=1)
    """Maximum number of grader processes, which grade responses while the sampler generates others. Graders that may be
    slow or unsafe run in them: `boxed`, `module:function` and the scorers of reasoning-gym."""
    pool: Literal["none", "ray"] = "none"
    """`none`: grader processes run on the machine of the trainer. `ray`: they run on the machines of the cluster of
    `sampler.pool ray`, spread evenly (docs/scaling.md). The rewards are the same."""
    seconds: float = Field(10.0, gt=0)
    """Time limit in seconds for grading one response in a grader process. If it is exceeded, the process is killed, and
    the response counts as not graded."""
    memory: float = Field(4.0, ge=0)
    """Limit on the address space of each grader process in gibibytes; 0 means no limit."""
    truncated: bool | None = None
    """Also grade responses that were cut off by the length limit. `false`: the reward of these responses is 0, as in
    the VinePPO paper. `true` is not allowed for the task `chain`. If it is not set, it is true for the task `dataset`
    (as in TRL), both for `vineppo train` and for `VinePPOTrainer`, and false for all other tasks."""
    max_error_share: float = Field(0.1, ge=0, le=1)
    """The run stops when the share of responses that could not be graded exceeds this value. Until then, responses that
    could not be graded get the reward 0."""
    trust_scorer: bool = False
    """Also run scorers of reasoning-gym that evaluate the model's answer as Python code (such as that of `countdown`)
    where the system has no sandbox for grader processes. `vineppo doctor` shows whether there is one. `false`: the task
    is refused there. Where there is a sandbox, it is used in any case."""


class TaskConfig(Settings):
    """The data set of problems, and how responses are graded.

    A docstring that begins with names of tasks belongs to a setting that only these tasks use.
    """

    name: str = "chain"
    """`chain`: chained arithmetic, generated by the package. `gsm8k`, `math`: the benchmarks GSM8K and MATH, from the
    hub or from files. `dataset`: problems in a table of the user. `reasoning_gym:NAME`: a data set of the library
    reasoning-gym, such as `reasoning_gym:chain_sum`."""
    level: Literal["judgement", "habit"] = "judgement"
    """chain: which of the two ways of writing a step is reliable. `judgement`: this depends on the step. `habit`: the
    same way is reliable for all steps."""
    num_steps: int = Field(10, ge=1)
    """chain: number of reasoning steps of each problem. Problems with more steps are more difficult."""
    trap_share: float | None = Field(None, ge=0, le=1)
    """chain: probability that a step of a problem is a trap, that is, a step at which the way decides whether the
    result is right. Null: the kinds of steps are drawn uniformly, and a third of the steps are traps on average."""
    writers: Literal["settled", "free", "wavering"] = "settled"
    """chain: kind of the demonstrations that `vineppo sft` imitates. In `free` demonstrations, the words that do not
    matter vary more than in `settled` ones; in `wavering` demonstrations, the ways of writing a step vary more, too
    (details: the docstring of `vineppo.tasks.chain`)."""
    train_problems: int | None = Field(None, ge=1)
    """Number of training problems: the first ones of the training split. Null: all of them."""
    train_path: str = ""
    """dataset, gsm8k, math: training problems, as a .jsonl, .json, .csv (also .jsonl.gz and so on) or .parquet file, a
    directory saved by `datasets`, or a hub id (`org/name`, `org/name/subset`, `org/name:split`). Empty: gsm8k and math
    use the data set on the hub."""
    validation_path: str = ""
    """dataset, gsm8k, math: validation problems, in one of the forms allowed for `train_path`. Empty: the last training
    problems are used for validation instead of training (a tenth of them, at most 200; 373 for GSM8K and 500 for MATH,
    as in the VinePPO paper)."""
    test_path: str = ""
    """dataset, gsm8k, math: test problems, in one of the forms allowed for `train_path`. Empty: there is no test split,
    unless `train_path` is also empty; gsm8k and math then use the data set on the hub."""
    prompt_column: str = ""
    """dataset, gsm8k, math: column with the text of the problem, or with a conversation as a list of messages. Empty:
    the default of the task, which is `prompt` for `dataset`."""
    answer_column: str = ""
    """dataset, gsm8k, math: column with the reference answer, as text or a number (72.0 is `72`).
    `reward_model.ground_truth` is the entry `ground_truth` in the column `reward_model`. Empty: the default of the
    task, which is `answer` for `dataset`; this column may be missing if all rewards are `module:function`."""
    demonstration_column: str = ""
    """dataset, gsm8k, math: column with the response that `vineppo sft` imitates. Empty: the default of the task, which
    is the answer column for `dataset`."""
    demonstrator: str = ""
    """`module:function`, the name of a function fn(prompt, answer, **columns) that returns the response which `vineppo
    sft` imitates. Empty: the demonstrations of the task."""
    prompt_template: str = ""
    """Text of the prompt, in which `{prompt}` is replaced by the text of the problem. Empty: the default of the task,
    which is the text of the problem alone for `dataset`. The task `chain` does not use this setting."""
    chat_template: bool = False
    """Format the prompt as a user message with the tokenizer's chat template. A prompt that is a list of messages is
    always formatted."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Values of variables of the chat template, such as `{enable_thinking: false}`."""
    overlong: Literal["error", "drop"] = "error"
    """dataset, gsm8k, math: what to do with problems whose prompt is too long for the model's context together with a
    response of maximum length. `error`: refuse them before the run starts. `drop`: leave them out, with a warning that
    counts them."""
    options: dict[str, Any] = Field(default_factory=dict)
    """reasoning_gym: options of the data set, such as `{min_terms: 2, max_terms: 4}`. The option `size` is the number
    of training problems, 10000 by default."""
    rewards: tuple[str, ...] = ()
    """Reward functions. `exact` gives 1 if the response equals the reference answer except for white space at both
    ends, `hash` if the numbers after their last `####` are equal, `boxed` if the content of the last `\\boxed{}` is
    exactly equal to the reference answer, in any usual notation. `module:function` is a function fn(prompts,
    completions, completion_ids, **columns) -> list with a number or None for each completion, called with one response
    at a time in a separate process. Empty: the default of the task, which is `exact` for `dataset`."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward function in the reward, which is a weighted sum. Empty: all weights are 1."""
    grading: GradingConfig = Field(default_factory=GradingConfig)

    @property
    def grades_truncated(self) -> bool:
        """Whether responses that were cut off by the length limit are graded: `grading.truncated` or its default."""
        return self.name == "dataset" if self.grading.truncated is None else self.grading.truncated

    def check(self) -> None:
        """Raise UserError for a value that is not allowed, or that does not fit the task or the other settings."""
        require(
            self.num_steps <= 25, f"task.num_steps is {self.num_steps}; it must be at most 25 (variables are letters)"
        )
        require(
            self.name in TASKS or self.name.startswith(GYM),
            f"task.name is {self.name!r}; allowed: {', '.join(TASKS)}, or reasoning_gym:NAME",
        )
        require(
            not self.prompt_template or "{prompt}" in self.prompt_template,
            f"task.prompt_template is {self.prompt_template!r}; it must contain {{prompt}}, which is replaced by the "
            "text of the problem",
        )
        self._check_chat_template()
        require(
            not self.grading.truncated or self.name != "chain",
            "task.grading.truncated is true, but task.name is chain, and a truncated response to a chain problem is "
            "never right; set task.grading.truncated to false",
        )
        require(
            not self.demonstrator or self.name != "chain",
            "task.demonstrator is set, but task.name is chain, which generates its demonstrations (task.writers); "
            "remove task.demonstrator",
        )
        require(
            self.overlong == "error" or (self.name in TASKS and self.name != "chain"),
            f"task.overlong is drop, but task.name is {self.name}, which generates its problems; remove task.overlong",
        )
        require(
            not self.options or self.name.startswith(GYM),
            f"task.options is only for reasoning_gym tasks, but task.name is {self.name}; remove task.options",
        )
        require(
            not (self.rewards and self.reward_weights) or len(self.reward_weights) == len(self.rewards),
            f"task.reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} task.rewards; give "
            "one number for each reward function, or no numbers",
        )
        require(
            sum(map(abs, self.reward_weights)) <= MAX_WEIGHTS,
            f"the magnitudes in task.reward_weights add up to {sum(map(abs, self.reward_weights)):g}; allowed: at most "
            f"{MAX_WEIGHTS:g}; divide all weights by the same number",
        )

    def _check_chat_template(self) -> None:
        """Raise UserError if the settings of the chat template have no effect or change what the task decides."""
        formatted = self.chat_template or not (self.name == "chain" or self.name.startswith(GYM))
        require(
            not self.chat_template_kwargs or formatted,
            "task.chat_template_kwargs is set, but no chat template is applied to the prompts; set task.chat_template "
            "to true, or remove task.chat_template_kwargs",
        )
        require(
            not self.chat_template or self.name != "chain",
            "task.chat_template is true, but task.name is chain, whose prompts are plain text; set task.chat_template "
            "to false",
        )
        reserved = [name for name in self.chat_template_kwargs if name in _SET_BY_THE_TASK]
        require(
            not reserved,
            f"task.chat_template_kwargs has {', '.join(reserved)}, which the task sets itself; remove it, and give "
            "variables of the chat template only",
        )


class RolloutConfig(Settings):
    """Number of responses per iteration, and how the responses are sampled."""

    num_problems: int = Field(8, ge=1)
    """P: number of problems per iteration."""
    group_size: int = Field(4, ge=1)
    """G: number of responses per problem."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of sampling (rollouts and Monte-Carlo rollouts) and of the log-probabilities in the loss. Training
    has no top_p or top_k, because the sampling distribution would then differ from the distribution that is trained."""
    max_new_tokens: int = Field(120, ge=1)
    """Maximum length of a response in tokens. A response that is cut off at this length has no end-of-sequence token,
    and its reward is 0 unless such responses are graded (`task.grading.truncated`)."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, in addition to the end-of-sequence token. The response includes the string."""
    max_rows: int = Field(2048, ge=1)
    """Maximum number of sequences in a batch of the sampler. More sequences are sampled in several batches."""
    kv_memory: float | None = Field(None, gt=0)
    """Maximum memory of the sampler's KV cache in gibibytes. Sequences that need more are sampled in several batches.
    Null: 4 on a CPU. On a CUDA GPU, half of the memory that weights, optimizer and other processes leave, rounded down
    to a power of two and at least 1; give a number if runs on different GPUs should have the same batches."""

    def check(self) -> None:
        """Raise UserError for an empty stop string."""
        require(all(self.stop), "rollouts.stop contains an empty string; give the text that ends a response")


class VLLMConfig(Settings):
    """Settings of vLLM, which `sampler.engine: vllm` selects."""

    dtype: Literal["model", "float32", "bfloat16", "float16"] = "model"
    """Data type in which vLLM computes. `model`: that of the policy."""
    gpu_memory_share: float = Field(0.3, gt=0, le=1)
    """Share of the GPU's memory for vLLM: its weights, keys and values. The trainer needs the rest if it is on the same
    GPU. On a CPU, `rollouts.kv_memory` limits the keys and values instead."""
    devices: str = ""
    """Numbers of the GPUs of the engine, such as `1` or `1,2`, as nvidia-smi counts them; several share the model
    (tensor parallelism). With several trainers on a machine, each has an engine, and the engines divide these GPUs.
    Empty: the engine is on the GPU of its trainer."""
    sleep: bool = False
    """Free the memory of the engine on the GPU during the updates of the trainer. It takes a few seconds per
    iteration."""
    max_length: int = Field(0, ge=0)
    """Maximum length of a sequence in tokens, prompt and response together. 0: as long as the model and the memory of
    keys and values allow."""
    enforce_eager: bool = False
    """Do not compile the model and record no CUDA graphs: a faster start and slower sampling."""
    transfer: Literal["auto", "files", "ipc", "nccl"] = "auto"
    """Way of new weights to the engine. `files`: through files in memory, which works everywhere on one machine. `ipc`:
    CUDA IPC, for a GPU that trainer and engine share, not with several trainers. `nccl`: between GPUs. `auto`: `nccl`
    with `devices`, or else `ipc` for one trainer on a GPU and `files` for several and on a CPU."""
    max_gap: float | None = Field(None, gt=0)
    """Bound of the check after every update of the weights: largest root mean square of the differences between the
    engine's and the trainer's log-probabilities of a fixed text, in nats. If it is not set, the bound is 0.02 if both
    compute in float32, and 0.5 otherwise."""

    def check(self) -> None:
        """Raise UserError if `devices` is no list of numbers."""
        require(
            re.fullmatch(r"(\d+(,\d+)*)?", self.devices) is not None,
            f"sampler.vllm.devices is {self.devices!r}; give numbers of GPUs separated by commas, such as 1,2",
        )


class SamplerConfig(Settings):
    """The program that samples responses and continuations."""

    engine: Literal["auto", "engine", "torch", "vllm"] = "auto"
    """`engine`: the package's compiled engine, for the CPU and for the families of models that it knows. `torch`: the
    PyTorch sampler, for every model and device. `auto`: the compiled engine if it can be used and is faster, or else
    the PyTorch sampler. The engine computes in float32, so it is slower for 16-bit weights on processors that multiply
    16 bits fast. `vllm`: vLLM in a process of its own, which must be installed (docs/vllm.md)."""
    check_every: int = Field(0, ge=0)
    """PyTorch sampler: number of tokens per sequence between two looks at which sequences are finished. Every look has
    to wait for a GPU. What a sequence draws after its end is dropped. 0: 1 on a CPU, 8 on a GPU. On a GPU, 1, 2, 4 and
    8 give equal bits; other values can change results by rounding."""
    graph: bool = False
    """PyTorch sampler on a CUDA GPU: capture the decoding of a token as a CUDA graph, which saves the launches of about
    2,000 small kernels per token. No GPU has run this yet, so it is off by default. Models that cannot be captured are
    decoded without graphs, with one warning."""
    vllm: VLLMConfig = Field(default_factory=VLLMConfig)
    pool: Literal["none", "ray"] = "none"
    """`none`: the sampler runs in the process of the trainer. `ray`: samplers run in actors of Ray, on this machine or
    on several (docs/scaling.md). Completions have the same bits for any number of actors."""
    workers: int = Field(0, ge=0)
    """pool ray: number of actors. 0: one per GPU of the cluster if `model.device` is a GPU, or else one per CPU core
    except one."""
    address: str = ""
    """pool ray: address of a running Ray cluster, such as `auto` or `10.0.0.1:6379`. Empty: a cluster is started on
    this machine, and ends with the run."""
    unit_rows: int | None = Field(None, ge=1)
    """pool ray: maximum number of sequences of a unit. An actor samples one unit at a time, as one batch. Small units
    keep many actors busy; large ones use a processor better. With the PyTorch sampler, another value changes results by
    rounding. Null: 16 with the compiled engine; with the PyTorch sampler 64 on a CPU and 256 on a GPU."""
    unit_memory: float = Field(4.0, gt=0)
    """pool ray: maximum memory of the KV cache of a unit in gibibytes. With the PyTorch sampler, another value can
    change results by rounding."""

    def check(self) -> None:
        """Raise UserError if the actors of the pool cannot run the engine."""
        require(
            self.pool == "none" or self.engine != "vllm",
            "sampler.pool is ray and sampler.engine is vllm; actors of the pool run the engines of the package: set "
            "sampler.engine to auto, engine or torch, or sampler.pool to none",
        )


class CriticConfig(Settings):
    """Settings of the value network. The settings class of an algorithm with a value network extends this class."""

    value_lr: float = Field(1e-4, gt=0)
    """Learning rate of the value network, which starts as a copy of the policy with a new linear head."""
    value_warmup_updates: int = Field(0, ge=0)
    """Number of updates over which the learning rate of the value network rises linearly from 0."""
    value_head_scale: float = Field(1.0, ge=0)
    """Standard deviation of the initial weights of the value network's head, in units of 1 / sqrt(hidden size + 1). If
    it is 0, all predicted values are 0 at the start. Use 0 if the metric `value/explained_variance` starts far below 0,
    which happens with models whose last hidden states are large."""
    value_only_iterations: int = Field(0, ge=0)
    """Number of iterations at the start in which only the value network is trained."""
    value_clip: float = Field(0.2, ge=0)
    """Clipping range of the value loss in reward units, as in PPO: a prediction is clipped to at most this distance
    from the prediction before the updates of the iteration. 0 turns clipping off."""


class KLConfig(Settings):
    """Penalty on the KL divergence from the frozen starting model."""

    coefficient: float = Field(0.0, ge=0)
    """Weight of the penalty. If it is 0, there is no penalty and no reference model."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimate of the KL divergence for each token, with d = logprob - ref_logprob: k1 = d, k2 = d^2 / 2,
    k3 = exp(-d) - 1 + d."""
    place: Literal["loss", "reward"] = "loss"
    """`loss`: the penalty is a differentiable term of the loss. `reward`: the advantage of a token is reduced by the
    penalties of this token and of all later ones."""
    reduction: Literal["sequence_sum", "token_mean", "as_policy"] = "sequence_sum"
    """For `place: loss`. `sequence_sum`: sum over the tokens of a response and mean over responses, as in the code of
    the VinePPO paper. `token_mean`: mean over all tokens, which is smaller by a factor of the mean response length.
    `as_policy`: like the policy loss (`learner.reduction`)."""
    clamp: float = Field(10.0, gt=0)
    """The KL estimate of each token is clamped to [-clamp, clamp], in nats."""
    importance_weighted: bool = False
    """For `place: loss`: multiply the KL estimate of each token by the probability ratio between the current and the
    old policy, through which the gradient flows. If true, the expected gradient of k1 and k3 is that of
    KL(policy || reference) (DeepSeek-V3.2, arXiv 2512.02556; `use_bias_correction_kl` of TRL). If false, the expected
    gradient of k3 is that of KL(reference || policy)."""

    share: float = Field(1.0, gt=0, le=1)
    """For `place: loss`: probability with which the KL term of a response is computed. It is then divided by this
    number, so that the expected gradient stays the same. A lower share saves time, because other responses need no
    reference model and only the tokens with an advantage, and adds noise to the gradient of the KL term."""

    def check(self) -> None:
        """Raise UserError for the estimator k1 in the loss, because its expected gradient is 0 there, and for a share
        of the penalty in the reward.
        """
        require(
            self.share == 1 or self.place == "loss" or self.coefficient == 0,
            f"learner.kl.share is {self.share:g} and learner.kl.place is reward, but only a KL term in the loss can be "
            "computed for a part of the responses; set learner.kl.share to 1 or learner.kl.place to loss",
        )
        require(
            not (self.place == "loss" and self.estimator == "k1" and self.coefficient > 0) or self.importance_weighted,
            "learner.kl.estimator is k1, whose expected gradient in the loss is 0; set learner.kl.estimator to k2 or "
            "k3, learner.kl.place to reward, or learner.kl.importance_weighted to true",
        )


class LearnerConfig(Settings):
    """Settings of PPO's clipped objective and of the optimizer, which all algorithms share."""

    lr: float = Field(1e-4, ge=0)
    """Peak learning rate of the policy (optimizer AdamW)."""
    warmup_updates: int = Field(0, ge=0)
    """Number of updates over which the learning rate of the policy rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: `constant`, or falling to 0 at the end of the run, `linear` or as a `cosine`."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moments of AdamW."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Maximum global norm of the gradient, for the policy and the value network separately. Larger gradients are
    clipped; 0 turns clipping off."""
    epochs: int = Field(2, ge=1)
    """Number of passes over the rollouts of each iteration."""
    minibatch_size: int = Field(32, ge=1)
    """Number of rollouts per update. The number of updates per epoch does not depend on how many training samples the
    algorithm creates from the rollouts."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Maximum number of tokens per forward and backward pass, with padding. It affects memory and speed, not the
    result."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """PPO's objective clips the probability ratio between the current and the old policy from below at 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """PPO's objective clips the probability ratio between the current and the old policy from above at
    1 + clip_high."""
    importance_sampling_cap: float = Field(0.0, ge=0)
    """Truncated importance sampling (TIS) between the sampler and the trainer: the policy loss of every trained token
    is multiplied by min(cap, p / q), where p is the token's probability under the trainer before the first update of
    the iteration and q under the sampler. It lowers the bias from a sampler that computes in other numbers than the
    trainer. A usual cap is 2. 0 turns it off. Alternatives (`vineppo.alternatives`, `counterfactual`) are not
    corrected, because q of them is not recorded."""
    advantage_scaling: Literal["none", "std", "whiten"] = "none"
    """Scaling of the token advantages with statistics of the whole iteration: `none`, `std` (divide by the standard
    deviation), or `whiten` (subtract the mean and divide by the standard deviation)."""
    reduction: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """How the policy loss of an update is reduced to one number. `token_mean`: mean over all tokens, so long responses
    count more. `sequence_mean`: mean over the tokens of each response, then mean over responses, as in GRPO's paper.
    `constant`: sum over all tokens, divided by the number of responses times `rollouts.max_new_tokens` (Dr. GRPO)."""
    mask_truncated: bool = False
    """Leave responses that reached `rollouts.max_new_tokens` out of the loss. Their rewards still count in baselines.
    They count as responses in the reductions `sequence_mean` and `constant`."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus, which is the entropy of the next-token distribution, averaged over tokens."""
    kl: KLConfig = Field(default_factory=KLConfig)

    def check(self) -> None:
        """Raise UserError for values of `betas` that AdamW does not accept."""
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"learner.betas is {list(self.betas)}; each value must be at least 0 and below 1",
        )


class EvalConfig(Settings):
    """Settings of the evaluation on held-out problems."""

    every: int = Field(10, ge=0)
    """Number of iterations between evaluations on the validation split. If it is 0, the model is evaluated only before
    and after training."""
    num_problems: int = Field(64, ge=1)
    """Number of validation problems of each evaluation during training. The problems are the same in every
    evaluation."""
    final_num_problems: int = Field(256, ge=0)
    """Number of problems of the evaluations before and after training; 0 skips these evaluations."""
    num_samples: int = Field(1, ge=1)
    """Number of responses per problem. The accuracy is the mean reward of all responses."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature of the evaluation; 0 means greedy decoding."""
    greedy: bool = False
    """Also measure the mean reward of one greedy response per problem in the evaluations before and after training. If
    greedy decoding of the starting model already has the accuracy that sampling has after training, the training only
    made the distribution sharper."""
    split: Literal["validation", "test"] = "validation"
    """Split of the evaluations before and after training."""


_TRACKERS = ("tensorboard", "wandb", "trackio")


class RunConfig(Settings):
    """Run directory, length of the run, and output files."""

    dir: str = ""
    """Run directory, which the run creates. Empty: `runs/<recipe>-<algorithm>-seed<seed>`."""
    seed: int = Field(0, ge=0)
    """Seed from which all random numbers of the run are derived."""
    iterations: int = Field(60, ge=1)
    """Number of iterations. Each iteration samples responses, computes credit and updates the weights."""
    max_updates: int = Field(0, ge=0)
    """Stop after the iteration in which this number of updates is reached; 0 means no limit. Minibatches without
    training samples count as updates here and in the learning-rate schedule."""
    max_tokens: int = Field(0, ge=0)
    """Stop after the iteration in which this number of tokens generated for training is reached; 0 means no limit."""
    max_seconds: float = Field(0.0, ge=0)
    """Stop after the iteration in which this training time in seconds, without evaluation, is reached; 0 means no
    limit."""
    checkpoint_every: int = Field(20, ge=0)
    """Number of iterations between checkpoints. A checkpoint is also saved after every evaluation that is better than
    those of all checkpoints before. If it is 0, checkpoints are saved only at the start and at the end."""
    keep_checkpoints: int = Field(1, ge=1)
    """Number of most recent checkpoints to keep. Older checkpoints are removed, except the one with the best validation
    accuracy, which is kept in addition."""
    save_rollouts: bool = True
    """Write every rollout with its steps, values and advantages to a Parquet file."""
    save_continuations: int = Field(8, ge=0)
    """Number of rollouts per iteration for which the continuations are written, too, from which their credit was
    computed (`vineppo`, `spo_chain`, `counterfactual`): the first rollouts that have any. A continuation takes about a
    third as many bytes as its text has characters, about 30 bytes on the task `chain` (docs/metrics.md). 0 writes none.
    Training does not depend on it."""
    report_to: tuple[str, ...] = ()
    """Trackers to which the metrics are sent, any of `tensorboard`, `wandb` and `trackio`. The file metrics.jsonl is
    always written."""

    def check(self) -> None:
        """Raise UserError for an unknown tracker."""
        unknown = sorted(set(self.report_to) - set(_TRACKERS))
        require(not unknown, f"run.report_to has {', '.join(unknown)}; allowed: {', '.join(_TRACKERS)}")


class GuardConfig(Settings):
    """Checks that stop a run whose sampler and trainer do not agree."""

    max_logprob_gap: float | None = Field(None, gt=0)
    """Largest allowed difference between the sampler's and the trainer's log-probability of a token, in nats. A larger
    difference stops the run before the update. If it is not set, the bound is 0.01 for float32 and 5 for bfloat16."""
    max_logprob_excess: float = Field(0.02, gt=0)
    """Largest allowed mean of log-probability plus entropy of the sampled tokens, above or below 0, in nats per token.
    The mean is 0 if tokens are sampled from the trainer's distributions. A mean beyond the bound that is also 6
    standard errors from 0 stops the run before the update. A bound such as 100 switches the check off."""
    probe_every: int = Field(10, ge=0)
    """Number of iterations between probes. A probe samples a few tokens of a fixed prompt and compares their
    log-probabilities with those of the trainer. 0 switches the probes off."""


class Config(Settings):
    """The settings of a training run.

    A resolved configuration belongs to a subclass of this class, which `with_sections` creates. It also has a section
    with the settings of the chosen algorithm. The name of the section is the name of the algorithm.
    """

    algorithm: str = "vineppo"
    """Algorithm that computes the credit: `vineppo`, `counterfactual`, `ppo`, `grpo`, `grpo_lambda`, `rloo`,
    `reinforce`, `tree`, `tempo`, `spo_chain`, or `module:object` for a user-defined algorithm. The rest of the training
    is the same for all algorithms."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    rollouts: RolloutConfig = Field(default_factory=RolloutConfig)
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    guards: GuardConfig = Field(default_factory=GuardConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling. `with_sections` creates some classes at run time, and unpickling creates them again."""
        sections = {
            name: type(getattr(self, name)) for name in type(self).model_fields if name not in Config.model_fields
        }
        return _rebuilt, (sections, {name: getattr(self, name) for name in type(self).model_fields})

    def check(self) -> None:
        """Raise UserError for a decay of the learning rate to 0 if the number of updates is unknown.

        Raise it also for graders in a pool that does not exist.
        """
        require(
            self.task.grading.pool == "none" or self.sampler.pool == "ray",
            "task.grading.pool is ray and sampler.pool is none; graders run in the cluster of the samplers: set "
            "sampler.pool to ray, or task.grading.pool to none",
        )
        open_ended = [f"run.{name}" for name in ("max_tokens", "max_seconds") if getattr(self.run, name)]
        require(
            self.learner.decay == "constant" or bool(self.run.max_updates) or not open_ended,
            f"learner.decay is {self.learner.decay} and {' and '.join(open_ended)} may end the run, so it is unknown "
            "at which update the learning rate reaches 0; set run.max_updates too, or set learner.decay to constant",
        )


@functools.cache
def with_sections(**sections: type[Settings]) -> type[Config]:
    """Return a subclass of `Config` with additional sections.

    Args:
        sections: name of each section -> class of its settings. Sections whose class has no fields are left out. If
            none remains, the result is `Config` itself.
    """
    fields: dict[str, Any] = {
        name: (section, Field(default_factory=section)) for name, section in sections.items() if section.model_fields
    }
    if not fields:
        return Config
    return create_model("Config", __base__=Config, __doc__=Config.__doc__, __module__=__name__, **fields)


def _rebuilt(sections: dict[str, type[Settings]], values: dict[str, Any]) -> Config:
    """Create a configuration again from its additional sections and the values of its fields, for unpickling."""
    return with_sections(**sections)(**values)


class SFTConfig(Settings):
    """Settings of `vineppo sft`, supervised fine-tuning on the demonstrations of a task."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """The model to start from. `model.path` may be `new:tiny`, a tiny Llama with random weights and the tokenizer of
    the chain task."""
    task: TaskConfig = Field(default_factory=TaskConfig)
    out: str = ""
    """Directory for the trained model. It must not exist yet or must be empty."""
    updates: int = Field(1000, ge=1)
    """Number of optimizer updates."""
    batch_size: int = Field(64, ge=1)
    """Number of demonstrations per update."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Maximum number of tokens per forward and backward pass, with padding. It affects memory and speed, not the
    result."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate (optimizer AdamW). After the warm-up, the learning rate falls linearly to 0."""
    warmup_fraction: float = Field(0.03, ge=0, le=1)
    """Fraction of the updates in which the learning rate rises linearly from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_length: int = Field(2048, ge=1)
    """Maximum length of a demonstration in tokens. Longer demonstrations are not used, and their number is reported as
    `left out`."""
    seed: int = Field(0, ge=0)
    """Seed of the order of the demonstrations, and of the initial weights of `new:tiny`."""

    def check(self) -> None:
        """Raise UserError if `out` is empty."""
        require(bool(self.out), "out is empty; give the directory for the trained model (--out DIR)")


class EvalSpec(Settings):
    """Settings of `vineppo eval`, which measures pass@1 (a mean over samples), pass@k and the greedy accuracy."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    split: Split = "test"
    """Split of the problems: `train`, `validation` or `test`."""
    num_problems: int = Field(256, ge=1)
    """Number of problems. The first problems of the split are used, or all problems if the split has fewer."""
    num_samples: int = Field(4, ge=1)
    """Number of responses per problem."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of pass@1 and pass@k. Greedy decoding is always measured in addition."""
    max_new_tokens: int = Field(160, ge=1)
    """Maximum length of a response in tokens. A response that is cut off at this length counts as wrong, unless such
    responses are graded (`task.grading.truncated`)."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, in addition to the end-of-sequence token."""
    k: tuple[int, ...] = ()
    """Values of k for pass@k, each at most `num_samples`. Empty: only k = `num_samples`."""
    seed: int = 0
    """Seed of sampling and of the confidence intervals."""

    def check(self) -> None:
        """Raise UserError if a value of `k` is below 1 or above `num_samples`."""
        wrong = [k for k in self.k if not 1 <= k <= self.num_samples]
        require(not wrong, f"k is {wrong[:1]}; pass@k needs 1 <= k <= num_samples, which is {self.num_samples}")
