"""A pool of Ray actors: `make test-ray`.

Actors that are killed or stopped are real processes here; sampling/test_pool.py has the cases that need exact timing.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.workers import in_this_process

from tests.helpers import ROOT, small_config, weights_hash
from tests.sampling.test_sampler import build_policy, prompts_and_states
from tests.training.test_ranks import SMALL
from tests.training.test_ranks import train as train_ranks
from vineppo.config.schema import GradingConfig, LoraConfig, ModelConfig, SamplerConfig, TaskConfig
from vineppo.model.policy import Policy
from vineppo.sampling import pool as pool_module
from vineppo.sampling.build import Engine, build_sampler
from vineppo.sampling.engine.library import load
from vineppo.sampling.ray import RaySampler
from vineppo.sampling.torch.pace import Pace
from vineppo.sampling.version import StaleWeights
from vineppo.tasks.grading.graders import load_grader
from vineppo.tasks.grading.ray import RayCrew, RayGraders
from vineppo.tasks.grading.remote import RemotePool
from vineppo.tasks.grading.sandbox import Protection, missing_protection
from vineppo.tasks.grading.workers import WorkerPool
from vineppo.training.loop import train
from vineppo.types import Completion, Failure, Problem, SampleRequest, TrainingWarning, UserError

pytestmark = pytest.mark.ray
ENGINES = ["torch", pytest.param("engine", marks=pytest.mark.skipif(load() is None, reason="the engine is not built"))]
ROWS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A local cluster with four CPU cores, which the samplers of this module use."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def policy() -> Policy:
    return build_policy()


REQUESTS = [
    r
    for n in range(4)
    for r in [SampleRequest(q.prompt_ids, 3, q.max_new_tokens, 1000 * n + q.seed) for q in prompts_and_states()]
]


def sampler_of(policy: Policy, workers: int, engine: Engine = "torch") -> RaySampler:
    return RaySampler(policy, ModelConfig(), SamplerConfig(pool="ray", workers=workers, engine=engine, unit_rows=ROWS))


def in_units(policy: Policy, engine: Engine, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
    """The completions of the units, sampled one after another in this process with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = in_this_process(policy, engine, requests, ROWS)
    torch.set_num_threads(threads)
    return results


def process_of(cluster: Any, sampler: RaySampler, worker: int) -> int:
    pid: int = cluster.get(sampler.crew.actors[worker].__ray_call__.remote(lambda _: os.getpid()))
    return pid


@pytest.mark.parametrize("engine", ENGINES)
def test_any_number_of_actors_has_the_bits_of_the_units_in_this_process(
    engine: Engine, cluster: Any, policy: Policy
) -> None:
    expected, sampler = in_units(policy, engine, REQUESTS), sampler_of(policy, 3, engine)
    for workers in (1, 2, 3):
        sampler.crew.size = workers  # The first actors get all units.
        assert sampler.sample(REQUESTS) == expected
        assert set(sampler.pool.last.by.values()) <= set(range(workers))
        assert not sampler.pool.last.died
    sampler.close()
    if engine == "engine":  # Its bits do not depend on the batch.
        assert build_sampler(policy, engine).sample(REQUESTS) == expected


def test_a_kill_changes_no_bit_and_only_unfinished_units_run_again(cluster: Any, policy: Policy) -> None:
    expected, sampler = in_units(policy, "torch", REQUESTS), sampler_of(policy, 2)
    for kill in ("ray.kill", "SIGKILL"):
        finished_before, seen = set[int](), list[Any]()
        pids = [process_of(cluster, sampler, worker) for worker in range(2)]

        def kill_the_other(finished: Sequence[tuple[int, Completion]]) -> None:
            """Kill the actor that did not sample the first unit, as soon as this unit has ended."""
            seen.extend(finished)  # noqa: B023
            if not finished_before:  # noqa: B023
                finished_before.update(sampler.pool.last.by)  # noqa: B023
                other = 1 - next(iter(sampler.pool.last.by.values()))
                if kill == "ray.kill":  # noqa: B023
                    cluster.kill(sampler.crew.actors[other])
                else:
                    os.kill(pids[other], signal.SIGKILL)  # noqa: B023

        with pytest.warns(TrainingWarning, match=r"Ray workers that died and were replaced: 1 \(.*again.* 1 of"):
            assert sampler.sample(REQUESTS, kill_the_other) == expected
        record = sampler.pool.last
        assert len(record.died) == 1 and len(record.lost) == 1
        assert record.started[record.lost[0]] >= 2
        assert all(record.started[unit] == 1 for unit in finished_before)
        assert len(seen) == sum(map(len, expected))
        assert process_of(cluster, sampler, 0) not in pids or process_of(cluster, sampler, 1) not in pids
    # The new actors get the weights of the next update.
    with torch.no_grad():
        policy.model.lm_head.weight *= 2
    sampler.update_weights(1, lambda: policy.model.state_dict().items())
    after = sampler.sample(REQUESTS)
    assert {c.version for group in after for c in group} == {1}
    assert ids_of(after) == ids_of(in_units(policy, "torch", REQUESTS)) != ids_of(expected)
    sampler.close()


def ids_of(results: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in group] for group in results]


def test_an_actor_with_old_weights_refuses(cluster: Any, policy: Policy) -> None:
    sampler = sampler_of(policy, 2)
    sampler.version = 1  # as if update_weights had not reached the actors
    with pytest.raises(StaleWeights, match="has the weights of update 0, and samples with those of update 1"):
        sampler.sample(REQUESTS)
    sampler.update_weights(1, lambda: policy.model.state_dict().items())
    assert {c.version for group in sampler.sample(REQUESTS) for c in group} == {1}
    sampler.close()


def test_a_stopped_actor_does_not_hold_the_others(
    cluster: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of actor 0 is stopped, and goes on after the call. It samples no unit of which the result counts."""
    monkeypatch.setattr(pool_module, "_PATIENCE_SECONDS", 0.1)
    sampler = sampler_of(policy, 2)
    expected = sampler.sample(REQUESTS)
    pid = process_of(cluster, sampler, 0)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert sampler.sample(REQUESTS) == expected
        assert set(sampler.pool.last.by.values()) == {1}
        assert list(sampler.pool.late.values()) == [0]
        # Its unit was copied. (A unit that takes long by chance is not: its only other worker is the stopped one.)
        assert sorted(sampler.pool.last.started.values())[-2:] == [1, 2]
    finally:
        os.kill(pid, signal.SIGCONT)
    cluster.wait(list(sampler.pool.late))
    assert sampler.sample(REQUESTS) == expected
    assert not sampler.pool.late and not sampler.pool.last.died
    sampler.close()


def test_mistakes_get_one_line(cluster: Any, policy: Policy) -> None:
    with pytest.raises(UserError, match=r"sampler.workers is 5, but the Ray cluster has 4 CPUs and every worker needs"):
        sampler_of(policy, 5)
    settings = SamplerConfig(pool="ray", workers=1, engine="torch", unit_memory=1e-6)
    sampler = RaySampler(policy, ModelConfig(), settings)
    with pytest.raises(UserError, match=r"raise sampler.unit_memory"):
        sampler.sample(REQUESTS)
    sampler.close()


def test_actors_look_at_their_tokens_as_often_as_the_settings_say(cluster: Any, policy: Policy) -> None:
    settings = SamplerConfig(pool="ray", workers=1, engine="torch", unit_rows=ROWS, check_every=4, graph=True)
    sampler = RaySampler(policy, ModelConfig(), settings)
    paces = cluster.get(
        [actor.__ray_call__.remote(lambda worker: worker.sampler.pace) for actor in sampler.crew.actors]
    )
    assert paces == [Pace(4, 4)]
    assert (
        sampler.line == f"sampling with PyTorch: sampler.engine is torch, PyTorch {torch.__version__}, in 1 Ray worker"
    )
    expected = in_units(policy, "torch", REQUESTS)
    assert ids_of(sampler.sample(REQUESTS)) == ids_of(expected)
    sampler.close()


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without those that are measured by a clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]


@pytest.mark.skipif(load() is None, reason="the engine is not built")
@pytest.mark.parametrize("lora", [0, 4])
def test_a_training_with_the_engine_has_the_same_bits_with_and_without_a_pool(
    lora: int, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when an actor is killed in the second iteration."""
    sample, calls = RaySampler.sample, [0]

    def kill_once(self: RaySampler, requests: Sequence[SampleRequest], on_finished: Any = None) -> Any:
        calls[0] += 1
        if self.version and calls[0] > 0:
            calls[0] = -1000
            os.kill(process_of(cluster, self, 0), signal.SIGKILL)
        return sample(self, requests, on_finished)

    monkeypatch.setattr(RaySampler, "sample", kill_once)
    model = ModelConfig(lora=LoraConfig(r=lora))
    train(small_config(tmp_path / "none", model=model))
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        train(small_config(tmp_path / "ray", model=model, sampler=SamplerConfig(pool="ray", workers=2, unit_rows=8)))
    assert [str(w.message) for w in given if "Ray workers that died" in str(w.message)]
    assert calls[0] < 0
    assert metrics_of(tmp_path / "ray") == metrics_of(tmp_path / "none")
    assert weights_hash(tmp_path / "ray/final") == weights_hash(tmp_path / "none/final")


@pytest.mark.skipif(load() is None, reason="the engine is not built")
def test_two_processes_with_a_pool_have_the_bits_of_two_processes_without(tmp_path: Path) -> None:
    """Process 0 has the actors. Both processes train."""
    pytest.importorskip("ray")
    for pool in ("none", "ray"):
        options = ["--sampler.pool", pool, "--sampler.workers", "2", "--run.iterations", "2"]
        text = train_ranks(2, *SMALL, *options, "--run.dir", str(tmp_path / pool))
    assert "in 2 Ray workers, 2 processes" in text
    assert metrics_of(tmp_path / "ray") == metrics_of(tmp_path / "none")
    assert weights_hash(tmp_path / "ray/final") == weights_hash(tmp_path / "none/final")


GRADERS = """
import time
from pathlib import Path
from vineppo.types import UserError

def graded(completions, answer, **columns):
    [text] = completions
    with (Path(__file__).parent / "graded.txt").open("a") as file:
        file.write(text + "\\n")
    if text == "stop":
        raise UserError("the judge model has no credit")
    if text == "hang":
        time.sleep(60)
    time.sleep(0.05)
    return [len(text) / 3 + int(answer[0]) * 1e-9]

def written(completions, **columns):
    try:
        (Path(__file__).parent / "written.txt").write_text("")
    except PermissionError:
        return [0.0]
    return [1.0]

def sevenths(completions, **columns):
    [text] = completions
    return [sum(map(ord, text)) % 7 / 7]
"""


@pytest.fixture
def graders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which the reward function `graded` of the module `my_ray_rewards` writes what it grades."""
    (tmp_path / "my_ray_rewards.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "graded.txt"


def test_actors_that_grade_have_local_verdicts_and_only_unfinished_responses_of_a_dead_one_are_graded_again(
    cluster: Any, graders: Path
) -> None:
    texts = ["a" * i for i in range(40)] + ["hang"]
    problems = [Problem(f"train/{i}", "?", str(i), {}) for i in range(41)]
    setup = ([functools.partial(load_grader, "my_ray_rewards:graded")], 2, 1.0, 0)
    local, remote = WorkerPool(*setup), RayGraders(*setup)
    expected = local.verdicts(problems, texts, [])
    local.close()
    assert expected[:40] == [(i / 3 + i * 1e-9,) for i in range(40)]
    assert isinstance(expected[40], Failure) and expected[40].timed_out
    remote.expect(problems[:1], texts[:1], [])
    pool = remote.judge
    assert isinstance(pool, RemotePool)
    assert pool.verdicts(problems, texts, []) == expected
    crew = pool._crew
    assert isinstance(crew, RayCrew)
    pids = [cluster.get(actor.__ray_call__.remote(lambda _: os.getpid())) for actor in crew.actors]
    assert len({os.getpid(), *pids}) == 3
    graders.unlink()
    pool.expect(problems[:40], texts[:40], [])  # eight responses for each actor, of which each takes 0.05 s
    os.kill(pids[0], signal.SIGKILL)
    with pytest.warns(TrainingWarning, match=r"a grading worker died and was replaced \(.*graded again, .*: 8$"):
        assert pool.verdicts(problems[:40], texts[:40], []) == expected[:40]
    counts = Counter(graders.read_text().split("\n"))
    assert all(counts[text] in (1, 2) for text in texts[1:40]) and sum(counts[text] == 2 for text in texts[1:40]) <= 8
    with pytest.raises(UserError, match=r"^the judge model has no credit$"):
        pool.verdicts(problems[:1], ["stop"], [])
    unpicklable = Problem("train/0", "?", "0", {"lock": threading.Lock()})
    with pytest.raises(UserError, match="the columns of a problem cannot be sent to a grader process"):
        pool.verdicts([unpicklable], ["x"], [])
    remote.close()


def test_actors_grade_in_the_sandbox(cluster: Any, graders: Path) -> None:
    if reason := missing_protection():
        pytest.skip(reason)
    cases: tuple[tuple[Protection, float], ...] = (("required", 0.0), ("none", 1.0))
    for protection, reward in cases:
        judge = RayGraders([functools.partial(load_grader, "my_ray_rewards:written")], 1, 10.0, 0, protection)
        assert judge.verdicts([Problem("train/0", "?", "0", {})], ["x"], []) == [(reward,)]
        assert (graders.parent / "written.txt").exists() == bool(reward)
        judge.close()


@pytest.mark.skipif(load() is None, reason="the engine is not built")
def test_a_training_with_graders_in_actors_has_the_bits_of_one_without(
    cluster: Any, graders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when an actor that grades is killed."""
    start, killed = RayCrew.start, list[int]()

    def kill_once(self: RayCrew, host: int, jobs: Sequence[Any]) -> Any:
        if host == 1 and not killed:
            killed.append(cluster.get(self.actors[1].__ray_call__.remote(lambda _: os.getpid())))
            os.kill(killed[0], signal.SIGKILL)
        return start(self, host, jobs)

    monkeypatch.setattr(RayCrew, "start", kill_once)
    for pool in ("none", "ray"):
        task = TaskConfig(num_steps=3, rewards=("my_ray_rewards:sevenths",), grading=GradingConfig(pool=pool))
        sampler = SamplerConfig(pool=pool, workers=2 if pool == "ray" else 0, unit_rows=8)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            train(small_config(tmp_path / pool, task=task, sampler=sampler))
    assert killed and any("a grading worker died" in str(w.message) for w in given)
    assert metrics_of(tmp_path / "ray") == metrics_of(tmp_path / "none")
    assert weights_hash(tmp_path / "ray/final") == weights_hash(tmp_path / "none/final")


class Namespaces:
    """Two network namespaces that a pair of virtual interfaces connects. To Ray they are two machines."""

    names = ("vineppo-a", "vineppo-b")
    token = secrets.token_hex(32)
    """Every process of the cluster needs it."""
    addresses = ("10.77.0.1", "10.77.0.2")

    def __enter__(self) -> Namespaces:
        a, b = self.names
        for command in (
            f"ip netns add {a}",
            f"ip netns add {b}",
            f"ip link add vin-a netns {a} type veth peer name vin-b netns {b}",
            f"ip -n {a} address add {self.addresses[0]}/24 dev vin-a",
            f"ip -n {b} address add {self.addresses[1]}/24 dev vin-b",
            f"ip -n {a} link set vin-a up",
            f"ip -n {b} link set vin-b up",
            f"ip -n {a} link set lo up",
            f"ip -n {b} link set lo up",
        ):
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                self.__exit__()
                pytest.skip(f"no network namespaces: {command}: {done.stderr.strip()}")
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def run(self, node: int, *command: str) -> str:
        """Run Python with arguments on a node, and return what it printed."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["ip", "netns", "exec", self.names[node], sys.executable, *command],
            capture_output=True,
            text=True,
            env=environment,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


RAY = "from ray.scripts.scripts import main; main()"
TRAIN = ["-m", "vineppo", "train", "judgement", "--run.iterations", "2", "--task.num_steps", "3", "--eval.every", "0"]
TRAIN += ["--eval.final_num_problems", "8", "--rollouts.num_problems", "8", "--learner.minibatch_size", "8"]
NODES = (
    "import ray; ray.init('auto', logging_level='ERROR'); print(len([n for n in ray.nodes() if n['Alive']]), 'nodes')"
)


@pytest.mark.skipif(sys.platform != "linux" or os.name != "posix", reason="network namespaces are a feature of Linux")
@pytest.mark.skipif(load() is None, reason="the engine is not built")
def test_two_nodes(tmp_path: Path) -> None:
    """A training on two nodes with one core each, so that each has one actor, equals one without a pool."""
    pytest.importorskip("ray")
    with Namespaces() as nodes:
        head, other = nodes.addresses
        nodes.run(0, "-c", RAY, "start", "--head", f"--node-ip-address={head}", "--port=6379", "--num-cpus=1")
        nodes.run(1, "-c", RAY, "start", f"--address={head}:6379", f"--node-ip-address={other}", "--num-cpus=1")
        assert "2 nodes" in nodes.run(0, "-c", NODES)
        pool = ["--sampler.pool", "ray", "--sampler.address", f"{head}:6379"]
        text = nodes.run(0, *TRAIN, *pool, "--sampler.workers", "2", "--run.dir", str(tmp_path / "ray"))
        assert "in 2 Ray workers" in text
        nodes.run(0, *TRAIN, "--run.dir", str(tmp_path / "none"))
    assert metrics_of(tmp_path / "ray") == metrics_of(tmp_path / "none")
    assert weights_hash(tmp_path / "ray/final") == weights_hash(tmp_path / "none/final")
