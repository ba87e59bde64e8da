"""Put faults into short trainings, and record which of them the package notices.

```
python dev/faults.py --out docs/results/faults.json --jobs 2      # make faults
python dev/faults.py --only "stale weights"
```

Each fault is put into a running training by replacing a function or a class, as a mistake in the code or in an engine
would. The training then runs for a few iterations. A fault is noticed if the run stops with an error or gives a
warning. Trainings without a fault show that the checks are silent otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import vineppo
from vineppo.config.recipes import load_recipe
from vineppo.config.schema import Config
from vineppo.learning.learner import TorchLearner
from vineppo.learning.optim import Optimizer
from vineppo.model.policy import Policy, Reference
from vineppo.sampling import build as sampling_build
from vineppo.sampling.torch import decoder, wave
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.sampling.version import RepeatedSeeds, StaleWeights
from vineppo.seeds import derive_seed, stream_keys
from vineppo.tasks.grading.graded import Graded
from vineppo.training import rollouts as training_rollouts
from vineppo.training.configure import build_config
from vineppo.training.loop import train
from vineppo.types import Completion, Rollout, SampleRequest, TrainingSample, UserError

ITERATIONS = 15
Patches = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Fault:
    """A fault and the training that it is put into."""

    text: str
    """What is wrong, in one sentence."""
    patches: Patches
    """Returns a context in which the fault is present."""
    algorithm: str = "grpo"
    settings: tuple[str, ...] = ()
    """Further settings of the training, each as `key=value`."""


def engine(cls: type[TorchSampler]) -> Patches:
    """Train with another sampler."""
    return lambda: patch.object(sampling_build, "TorchSampler", cls)


class StaleSampler(TorchSampler):
    """Copies the policy at the start and never takes new weights."""

    def __init__(self, policy: Any, **options: Any) -> None:
        super().__init__(policy.frozen_copy(), **options)


class ColdSampler(TorchSampler):
    """Samples at temperature 0.7, and reports the log-probabilities of that temperature."""

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        return super().sample([replace(request, temperature=0.7) for request in requests], on_finished)


class WithoutLastToken(TorchSampler):
    """Returns completions without the end-of-sequence token."""

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        def shortened(c: Completion) -> Completion:
            return replace(c, token_ids=c.token_ids[:-1], logprobs=c.logprobs[:-1]) if c.finish_reason == "stop" else c

        return [[shortened(c) for c in group] for group in super().sample(requests, on_finished)]


class WithoutAdapters(TorchSampler):
    """Samples with the base weights although adapters are trained."""

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        policy: Any = self.policy
        with policy.adapters.disable_adapter():
            return super().sample(requests, on_finished)


def other_draw(change: Callable[[torch.Tensor], torch.Tensor]) -> Patches:
    """Draw tokens from changed logits, and report the log-probabilities of the unchanged logits."""
    original = decoder.draw

    def draw(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, _ = original(change(logits.float()), temperature, uniform)
        logprobs = (logits.float() / (temperature or 1)).log_softmax(-1)
        return ids, logprobs.gather(1, ids[:, None])[:, 0]

    return lambda: patch.object(decoder, "draw", draw)


def nucleus(logits: torch.Tensor) -> torch.Tensor:
    """Keep the most likely tokens that have 90% of the probability together."""
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(
        1, order, probabilities.cumsum(-1) - probabilities > 0.9
    )
    return logits.masked_fill(removed, float("-inf"))


def same_random_numbers() -> AbstractContextManager[Any]:
    """All samples of a request use the random numbers of its first sample."""
    return patch.object(wave, "stream_keys", lambda seeds, samples: stream_keys(seeds, 0 * samples))


@contextlib.contextmanager
def seeds_without_iteration() -> Iterator[None]:
    """The seeds of rollouts depend on the position in the batch, but not on the iteration or the problem."""
    state: dict[str, Any] = {"iteration": None, "position": 0}

    def derive(*address: int | str) -> int:
        if "rollouts" not in address:
            return derive_seed(*address)
        if address[1] != state["iteration"]:
            state.update(iteration=address[1], position=0)
        state["position"] += 1
        return derive_seed(address[0], "rollouts", state["position"])

    with patch.object(training_rollouts, "derive_seed", derive):
        yield


def changed_samples(change: Callable[[TrainingSample], TrainingSample]) -> Patches:
    """Change every training sample before the update."""
    original = TorchLearner.update

    def update(self: TorchLearner, samples: Sequence[TrainingSample], *arguments: Any, **options: Any) -> Any:
        return original(self, [change(sample) for sample in samples], *arguments, **options)

    return lambda: patch.object(TorchLearner, "update", update)


def shifted(sample: TrainingSample) -> TrainingSample:
    """Train each token in place of the token after it."""
    return replace(sample, loss_mask=(*sample.loss_mask[1:], 0), advantages=(*sample.advantages[1:], 0.0))


def negated(sample: TrainingSample) -> TrainingSample:
    return replace(
        sample,
        advantages=tuple(-a for a in sample.advantages),
        alternatives=tuple(replace(a, advantage=-a.advantage) for a in sample.alternatives),
    )


def negated_returns(sample: TrainingSample) -> TrainingSample:
    return replace(sample, returns=tuple(-r for r in sample.returns or ()))


def no_step() -> AbstractContextManager[Any]:
    """The optimizer computes the gradient norm and leaves the weights as they are."""
    original = Optimizer.step
    return patch.object(Optimizer, "step", lambda self, lr, max_grad_norm: original(self, 0.0, max_grad_norm))


def shared_reference() -> AbstractContextManager[Any]:
    """The reference model is the policy itself."""

    def init(self: Reference, policy: Policy) -> None:
        self._policy = policy

    return patch.object(Reference, "__init__", init)


def dropout_in_scoring() -> AbstractContextManager[Any]:
    """The dropout of the adapters is active when the old log-probabilities are computed."""
    original = TorchLearner.logprobs

    def logprobs(self: TorchLearner, policy: Policy, *arguments: Any, **options: Any) -> Any:
        layers = [module for name, module in policy.model.named_modules() if "lora_dropout" in name]
        for layer in layers:
            layer.train()
        try:
            return original(self, policy, *arguments, **options)
        finally:
            for layer in layers:
                layer.eval()

    return patch.object(TorchLearner, "logprobs", logprobs)


def cold_continuations() -> AbstractContextManager[Any]:
    """Continuations of states are sampled at temperature 0.3, rollouts at 1."""
    from vineppo.credit import vineppo

    original = vineppo.MonteCarlo
    return patch.object(vineppo, "MonteCarlo", lambda **options: original(**{**options, "temperature": 0.3}))


def states_off_by_one() -> AbstractContextManager[Any]:
    """The states between steps lack their last token."""
    from vineppo.credit import vineppo

    original = vineppo.State

    def state(problem: Any, prompt_ids: Any, response_ids: tuple[int, ...], rollout: Rollout) -> Any:
        return original(problem, prompt_ids, response_ids[:-1], rollout)

    return patch.object(vineppo, "State", state)


LORA = ("model.lora.r=8", "model.lora.dropout=0.2", "learner.lr=3e-3")
KL = ("learner.kl.coefficient=0.001",)
# With five times the learning rate of the recipe and without clipping, targets of the wrong sign show within the run.
CRITIC = ("ppo.value_lr=5e-3", "ppo.value_clip=0")
VINES = ("vineppo.alternatives=false", "vineppo.reuse=false", "vineppo.num_mc_rollouts=3")
FAULTS = {
    "stale weights": Fault("The sampler ignores new weights and reports their version.", engine(StaleSampler)),
    "adapters missing": Fault("The sampler leaves out the adapters.", engine(WithoutAdapters), settings=LORA),
    "temperature": Fault("The sampler uses temperature 0.7 instead of 1.", engine(ColdSampler)),
    "temperature, policy's log-probabilities": Fault(
        "The sampler uses temperature 0.7 and reports log-probabilities at 1.", other_draw(lambda x: x / 0.7)
    ),
    "top-p": Fault("The sampler uses top-p 0.9 and reports log-probabilities without it.", other_draw(nucleus)),
    "same random numbers": Fault("All samples of a request use the same random numbers.", same_random_numbers),
    "seeds without iteration": Fault("Every iteration samples with the same seeds.", seeds_without_iteration),
    "last token missing": Fault("The sampler leaves out the end-of-sequence token.", engine(WithoutLastToken)),
    "shifted mask": Fault("The loss mask is shifted by one token.", changed_samples(shifted)),
    "dropout in scoring": Fault("Dropout is active when tokens are scored.", dropout_in_scoring, settings=LORA),
    "optimizer without effect": Fault("The optimizer does not change the weights.", no_step),
    "shared reference": Fault("The reference model shares the policy's weights.", shared_reference, settings=KL),
    "advantages negated": Fault("The advantages have the wrong sign.", changed_samples(negated)),
    "reward always 0": Fault(
        "The grader gives every response the reward 0.",
        lambda: patch.object(Graded, "_reward", lambda self, verdict: 0.0),
    ),
    "returns negated": Fault(
        "The value network learns returns of the wrong sign.", changed_samples(negated_returns), "ppo", CRITIC
    ),
    "learning rate x 1000": Fault("The learning rate is 0.3.", contextlib.nullcontext, settings=("learner.lr=0.3",)),
    "continuations at another temperature": Fault(
        "Monte-Carlo continuations are sampled at temperature 0.3, rollouts at 1.", cold_continuations, "vineppo", VINES
    ),
    "states off by one": Fault(
        "The states that are valued lack their last token.", states_off_by_one, "vineppo", VINES
    ),
}
CONTROLS = {
    "no fault (grpo)": Fault("", contextlib.nullcontext),
    "no fault (grpo, adapters)": Fault("", contextlib.nullcontext, settings=LORA),
    "no fault (ppo)": Fault("", contextlib.nullcontext, "ppo", CRITIC),
    "no fault (vineppo)": Fault("", contextlib.nullcontext, "vineppo", VINES),
    "no fault (vineppo, alternatives)": Fault("", contextlib.nullcontext, "vineppo"),
}


class Counter:
    """A reporter that remembers the last iteration."""

    last = 0

    def start(self, sampler: str) -> None: ...

    def phase(self, name: str) -> None: ...

    def before_iteration(self, iteration: int) -> None: ...

    def saved(self, iteration: int) -> None: ...

    def iteration(self, metrics: Any) -> None:
        self.last = metrics["iteration"]

    def wants_to_stop(self) -> bool:
        return False

    def finish(self, summary: Any, run_dir: Path) -> None: ...


def configuration(fault: Fault, folder: Path) -> Config:
    """Return the configuration of a training of 15 iterations with 32 problems x 4 responses (1 for vineppo)."""
    group = 1 if fault.algorithm == "vineppo" else 4
    settings = {
        "rollouts.num_problems": 32,
        "rollouts.group_size": group,
        "learner.minibatch_size": 32 * group // 2,
        "run.iterations": ITERATIONS,
        "run.checkpoint_every": 0,
        "run.save_rollouts": False,
        "run.dir": str(folder / "run"),
        "eval.every": 0,
        "sampler.engine": "torch",  # some faults replace functions of the PyTorch sampler
        "eval.final_num_problems": 0,
    }
    settings |= dict(setting.split("=") for setting in fault.settings)
    return build_config(load_recipe("judgement"), fault.algorithm, settings)


def other_warnings(caught: Sequence[warnings.WarningMessage], known: Sequence[str]) -> list[str]:
    """Return the texts of the package's own warnings that are not among `known`.

    Warnings of other libraries, such as FutureWarning and DeprecationWarning, are left out.
    """
    package = str(Path(vineppo.__file__).parent)
    own = [w for w in caught if issubclass(w.category, UserWarning) and w.filename.startswith(package)]
    return [str(w.message) for w in own if str(w.message) not in known]


def notice(fault: Fault) -> dict[str, Any]:
    """Train with a fault. Return what noticed it, and after how many iterations with an update."""
    reporter, found = Counter(), {"noticed": False, "by": ""}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught, fault.patches():
        warnings.simplefilter("always")
        try:
            summary = train(configuration(fault, Path(folder)), reporter=reporter)
        except (UserError, StaleWeights, RepeatedSeeds) as error:
            return {"noticed": True, "how": "stopped", "by": str(error), "iterations": reporter.last}
        texts = summary["warnings"] + other_warnings(caught, summary["warnings"])
    if texts:
        number = texts[0].partition("iteration ")[2].partition(":")[0]
        found = {"noticed": True, "how": "warned", "by": texts[0], "iterations": int(number or 0)}
    return found


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    rows = ["| fault | noticed | iterations trained before | by |", "|---|---|---|---|"]
    for name, result in results["faults"].items():
        text = FAULTS[name].text
        if result["noticed"]:
            by = result["by"].replace("|", "\\|")
            rows.append(f"| {text} | {result['how']} | {result['iterations']} | {by} |")
        else:
            rows.append(f"| {text} | no | | |")
    return "\n".join(rows)


def main() -> None:
    """Run all faults, or one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="name of one fault; the result is printed as JSON")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--page", type=Path, help="Markdown page whose table between the faults markers is replaced")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(notice({**FAULTS, **CONTROLS}[arguments.only])))
        return

    def run(name: str) -> tuple[str, Any]:
        done = subprocess.run([sys.executable, __file__, "--only", name], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} ended with exit code {done.returncode}:\n{done.stderr}")
        result = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {result.get('how', 'not noticed')} {result.get('by', '')[:100]}", flush=True)
        return name, result

    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = dict(pool.map(run, [*FAULTS, *CONTROLS]))
    faults = {name: found[name] for name in FAULTS}
    controls = {name: found[name] for name in CONTROLS}
    results = {
        "injected": len(faults),
        "noticed": sum(result["noticed"] for result in faults.values()),
        "false_alarms": sum(result["noticed"] for result in controls.values()),
        "iterations": ITERATIONS,
        "faults": faults,
        "controls": controls,
    }
    print(f"{results['noticed']} of {results['injected']} noticed, {results['false_alarms']} false alarms")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.page:
        before, _, rest = arguments.page.read_text().partition("<!-- faults -->\n")
        after = rest.partition("<!-- end of faults -->")[2]
        arguments.page.write_text(f"{before}<!-- faults -->\n{table(results)}\n<!-- end of faults -->{after}")


if __name__ == "__main__":
    main()
