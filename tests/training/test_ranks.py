"""Test training with several processes (ranks) on the CPU, started by torchrun. Slow: `make test-ranks`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from benchmarks.ranks import CASES, CONTROL, ROUNDED, measure
from safetensors.torch import load_file

import vineppo
from vineppo.run.shards import read_networks

pytestmark = pytest.mark.ranks

SHORT = (
    "judgement --task.num_steps 3 --rollouts.max_new_tokens 40 --rollouts.num_problems 4 --rollouts.group_size 4 "
    "--learner.minibatch_size 6 --learner.kl.coefficient 0.01 --eval.every 0 --eval.final_num_problems 8 "
    "--run.checkpoint_every 1 --run.keep_checkpoints 9"
)
SMALL = SHORT.split()
LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 1 --main_process_port 0 --mixed_precision no "
    "--dynamo_backend no --num_processes",
}
"""Name of a launcher -> module and options, without the number of processes. `accelerate launch` starts several only
with --multi_gpu, also if they use the CPU."""


def start(count: int, *arguments: str, script: Path | None = None, launcher: str = "torchrun") -> subprocess.Popen[str]:
    """Start `vineppo train` or a script with some number of processes; one process without a launcher."""
    paths = os.pathsep.join([str(Path(vineppo.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    launched = ["-m", *LAUNCHERS[launcher].split(), str(count)] if count > 1 else []
    program = [str(script)] if script else ["-m", "vineppo", "train"]
    command = [sys.executable, *launched, *program, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(count: int, *arguments: str, script: Path | None = None, launcher: str = "torchrun") -> str:
    """Run to the end, and return the output."""
    process = start(count, *arguments, script=script, launcher=launcher)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def distance(a: Path, b: Path) -> float:
    """Return the largest absolute difference of a final weight."""
    one, two = (load_file(run / "final" / "model.safetensors") for run in (a, b))
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def responses(run: Path) -> list[list[int]]:
    """Return the token ids of all saved rollouts."""
    tables = [pq.read_table(path, columns=["response_ids"]) for path in sorted((run / "rollouts").glob("*.parquet"))]
    return [row for table in tables for row in table["response_ids"].to_pylist()]


def test_updates_are_those_of_one_process() -> None:
    """Every algorithm, full and LoRA, with a critic, KL, entropy, dropout, checkpointing and bfloat16.

    The weights agree to 1e-6 after eight updates. With bfloat16, and where gradients are sums that cancel, they agree
    as well as those of one process with other micro-batches.
    """
    results = measure(list(CASES))
    for case, found in results.items():
        assert found["change"] > 1e-4, case  # the updates did something
        for count in ("2", "3"):
            rounding = max(found[CONTROL]["weights"], found[CONTROL]["critic"])
            allowed = 0.02 if case in ROUNDED else max(1e-6, 4 * rounding)
            assert max(found[count]["weights"], found[count]["critic"]) <= allowed, (case, found)


@pytest.mark.parametrize("algorithm", ["vineppo", "ppo"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, algorithm: str) -> None:
    """Two iterations with 2 processes, one more with 3, and one more with 1 are four iterations with 1."""
    one, many = tmp_path / "one", tmp_path / "many"
    arguments = [*SMALL, "--algorithm", algorithm]
    train(1, *arguments, "--run.iterations", "4", "--run.dir", str(one))
    output = train(2, *arguments, "--run.iterations", "2", "--run.dir", str(many))
    assert "2 processes" in output and output.count("iteration 2/2") == 1
    assert (many / "checkpoints" / "000002" / "learner" / "__1_0.distcp").is_file()
    assert bool(read_networks(many / "checkpoints" / "000002")["critic"]) == (algorithm == "ppo")
    train(3, "--resume", str(many), "--run.iterations", "3")
    train(1, "--resume", str(many), "--run.iterations", "4")
    assert (many / "checkpoints" / "000004" / "learner.pt").is_file()
    assert responses(one) == responses(many)
    assert distance(one, many) < 1e-6


def test_a_run_of_one_process_goes_on_with_three(tmp_path: Path) -> None:
    """With LoRA: the frozen weights are not in the checkpoint. A minibatch of one rollout is smaller than the ranks."""
    one, many = tmp_path / "one", tmp_path / "many"
    arguments = [*SMALL, "--algorithm", "reinforce", "--model.lora.r", "4", "--learner.minibatch_size", "5"]
    train(1, *arguments, "--run.iterations", "3", "--run.dir", str(one))
    train(1, *arguments, "--run.iterations", "1", "--run.dir", str(many))
    train(3, "--resume", str(many), "--run.iterations", "3")
    assert responses(one) == responses(many)
    assert distance(one, many) < 2e-6


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_with_one_line(tmp_path: Path, rank: int) -> None:
    run = tmp_path / "run"
    process = start(2, *SMALL, "--algorithm", "grpo", "--run.iterations", "500", "--run.dir", str(run))
    deadline = time.monotonic() + 300
    while not (run / "checkpoints" / "000002").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process_of_rank(process.pid, rank), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)  # all processes have ended within a minute
    assert process.returncode != 0
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "--resume" in lines[0], output
    done = len(list((run / "checkpoints").iterdir())) - 1
    output = train(2, "--resume", str(run), "--run.iterations", str(done + 1))
    assert (run / "summary.json").exists()


def process_of_rank(parent: int, rank: int) -> int:
    """Return the number of the process with a rank among the children of a launcher."""
    for folder in Path("/proc").iterdir():
        try:
            is_child = re.search(rf"^PPid:\t{parent}$", (folder / "status").read_text(), re.MULTILINE)
            if is_child and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no process has rank {rank}")


def test_a_mistake_is_one_line_and_ctrl_c_keeps_a_checkpoint(tmp_path: Path) -> None:
    process = start(2, *SMALL, "--model.path", str(tmp_path / "absent"), "--run.dir", str(tmp_path / "a"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and not (tmp_path / "a").exists()
    assert [line for line in output.splitlines() if "error:" in line.lower() and "absent" in line][1:] == []
    run = tmp_path / "run"
    process = start(2, *SMALL, "--algorithm", "grpo", "--run.iterations", "500", "--run.dir", str(run))
    while not (run / "checkpoints" / "000001").exists() and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert '"finish_reason": "interrupted"' in (run / "summary.json").read_text(), output


SCRIPT = """
import sys
from vineppo import VinePPOConfig, VinePPOTrainer

def reward(completions, answer, **_):
    return [float(len(text) % 3) for text in completions]

rows = [{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(8)]
args = VinePPOConfig(
    output_dir=sys.argv[1], per_device_train_batch_size=4, num_generations=2, steps_per_generation=2, max_steps=4,
    max_completion_length=12, use_cpu=True, report_to="none", algorithm="grpo", learning_rate=1e-4, beta=0.01,
)
trainer = VinePPOTrainer("embedded:judgement", reward, args, rows)
result = trainer.train()
trainer.save_model(sys.argv[1] + "-saved")
weights = [p.detach().double().sum().item() for p in trainer.model.parameters()]
print(f"result {result.global_step} {sum(weights):.4f}", flush=True)
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_trainer_does_the_same_in_every_process(tmp_path: Path, launcher: str) -> None:
    """The model of the script is trained on every rank, and files are written once."""
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    results = {}
    for count in (1, 2):
        output = train(count, str(tmp_path / str(count)), script=script, launcher=launcher)
        results[count] = [line for line in output.splitlines() if line.startswith("result")]
    assert len(results[1]) == 1 and results[2] == results[1] * 2
    assert distance(tmp_path / "1", tmp_path / "2") < 1e-6
    saved = [load_file(tmp_path / f"{count}-saved" / "model.safetensors") for count in (1, 2)]
    assert all(float((saved[0][name] - saved[1][name]).abs().max()) < 1e-6 for name in saved[0])
