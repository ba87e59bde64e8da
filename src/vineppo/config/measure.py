"""Define the settings of the commands that measure credit: `vineppo values`, `blame`, `variance` and `scaling`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vineppo.config.schema import ModelConfig, TaskConfig
from vineppo.config.settings import Settings, require
from vineppo.types import Split


class MeasureSpec(Settings):
    """Settings that the commands which measure credit on a model share."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    split: Split = "test"
    """Split of the problems: `train`, `validation` or `test`. The first problems of the split are used."""
    num_problems: int = Field(16, ge=1)
    """P: number of problems. Confidence intervals resample problems, so more problems make them narrower."""
    group_size: int = Field(8, ge=2)
    """G: number of responses that are sampled per problem."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of responses and continuations. For a run or a recipe, the default is its rollouts.temperature."""
    max_new_tokens: int = Field(160, ge=1)
    """Maximum length of a response in tokens, prefix and continuation together."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, in addition to the end-of-sequence token."""
    splitter: str = "newline"
    """How a response is cut into steps; the names are those of `vineppo.splitter`."""
    max_tokens: int = Field(3_000_000, ge=0)
    """Approximate limit of generated tokens. If the settings need more, fewer problems are measured, and the report
    says so. 0 means no limit."""
    seed: int = Field(0, ge=0)
    """Seed of all samples and of the bootstrap."""
    out: str = ""
    """Directory of the results (JSON, Markdown and plots). Existing results in it are replaced. Empty: runs/COMMAND."""

    def check(self) -> None:
        """Raise UserError for an empty stop string."""
        require(all(self.stop), "stop contains an empty string; give the text that ends a response")


class ValuesSpec(MeasureSpec):
    """Settings of `vineppo values`, which compares estimates of values with gold values."""

    responses: int = Field(1, ge=1)
    """Number of responses per problem whose states get gold values, at most `group_size`."""
    steps: int = Field(0, ge=0)
    """Number of steps of each of these responses that are drawn at random; the states at both ends of a step get gold
    values. 0 takes all steps."""
    gold: int = Field(256, ge=2)
    """N: number of continuations of a gold value. They are disjoint from those of all estimates."""
    k: tuple[int, ...] = (1, 3, 9)
    """Numbers of continuations K of the Monte-Carlo estimates, with and without reuse."""
    critic: str = ""
    """Directory of a run with a value network (an algorithm such as ppo) whose newest checkpoint predicts values.
    Empty: the run MODEL, if it has one."""
    choices: int = Field(16, ge=0)
    """Number of states at which an estimate must choose among five sampled next steps; 0 leaves this test out."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """A state is called good if its value is at least this, and bad otherwise."""

    def check(self) -> None:
        """Raise UserError for numbers that do not fit together."""
        super().check()
        require(bool(self.k) and min(self.k) >= 1, f"k is {self.k}; give numbers of at least 1, such as 1,3,9")
        require(
            self.responses <= self.group_size,
            f"responses is {self.responses} and group_size {self.group_size}; responses must be at most group_size",
        )


class BlameSpec(MeasureSpec):
    """Settings of `vineppo blame`, which resamples blamed steps and compares the change of success with a control."""

    num_problems: int = Field(48, ge=1)
    """P: number of problems."""
    group_size: int = Field(4, ge=2)
    """G: number of responses per problem."""
    responses: int = Field(1, ge=1)
    """Largest number of responses per problem whose blamed step is resampled."""
    which: Literal["failed", "all"] = "failed"
    """Responses whose blamed step is resampled: `failed` (reward below `threshold`) or `all`."""
    k: int = Field(9, ge=1)
    """K: continuations of each state from which the blamed step is chosen."""
    score: int = Field(64, ge=2)
    """Continuations of each state from which the effect is measured, disjoint from those that chose the step."""
    drop: float = Field(0.25, gt=0)
    """Smallest drop of the value at which a response is said to contain a wrong step, for the steps that a machine can
    check."""
    threshold: float = Field(0.5, gt=0)
    """Reward below which a response has failed."""


class VarianceSpec(MeasureSpec):
    """Settings of `vineppo variance`, which measures the noise of Monte-Carlo advantages."""

    group_size: int = Field(2, ge=2)
    """G: number of responses per problem, at least 2, so that the spread within a problem is known."""
    k: tuple[int, ...] = (1, 2, 4, 9)
    """Numbers of continuations K."""
    repeats: int = Field(4, ge=2)
    """Number of times that the values of the same states are estimated, for every K, with and without reuse."""
    gold: int = Field(64, ge=4)
    """Continuations of each state that give the kind of a step (one half of them) and the probability p of the
    binomial prediction (the other half); disjoint from the repeats."""
    decisive: float = Field(0.25, gt=0)
    """Smallest change of the value of a decisive step."""

    def check(self) -> None:
        """Raise UserError for a wrong K."""
        super().check()
        require(bool(self.k) and min(self.k) >= 1, f"k is {self.k}; give numbers of at least 1, such as 1,2,4,9")


class ScalingSpec(Settings):
    """Settings of `vineppo scaling`, which measures the cost of credit over the length of a chain on this machine."""

    steps: tuple[int, ...] = (10, 25, 50, 100, 250, 500)
    """Numbers of steps of the chains. The cost model is fitted to all except `held_out`."""
    held_out: int = Field(100, ge=1)
    """Number of steps at which the cost model is checked; it must be one of `steps`."""
    step_tokens: int = Field(3, ge=1)
    """Tokens per step."""
    k: int = Field(9, ge=1)
    """K: continuations per state."""
    width: int = Field(288, ge=144, multiple_of=144)
    """Hidden size of the model with random weights that writes the chains."""
    responses: int = Field(8, ge=1)
    """Largest number of responses per length; fewer if they need more than `max_tokens`."""
    max_tokens: int = Field(400_000, ge=1)
    """Approximate limit of generated tokens per length and method; at least one response is always measured, unless
    it alone needs more than four times this number, when the method is left out at this length."""
    repeats: int = Field(3, ge=1)
    """Number of timings; their median counts."""
    clock: Literal["wall", "cpu"] = "wall"
    """`wall`: seconds that pass. `cpu`: seconds of all cores of this process, which other processes disturb less."""
    gpus: tuple[str, ...] = ("a100", "h100")
    """Accelerators to which the cost model is applied, from their data sheets."""
    seed: int = Field(0, ge=0)
    """Seed of all samples."""
    out: str = ""
    """Directory of the results. Empty: runs/scaling."""

    def check(self) -> None:
        """Raise UserError for lengths from which no model can be fitted."""
        require(self.held_out in self.steps, f"held_out is {self.held_out}; it must be one of steps {self.steps}")
        require(
            len(set(self.steps)) >= 4 and min(self.steps) >= 1,
            f"steps is {','.join(map(str, self.steps))}; give at least four different numbers, such as 10,50,100,500",
        )
