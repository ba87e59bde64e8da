"""Test training with several processes (ranks) on the CPU, started by torchrun. Slow: `make test-ranks`.

tests/training/test_ranks_end.py has the processes that are killed or interrupted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from benchmarks.ranks import CASES, CONTROL, ROUNDED, compared, of_weights, prepare
from safetensors.torch import load_file

import vineppo
from tests.helpers import ROOT
from tests.training import ranks_program
from tests.training.ranks_program import Thing, printed
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
    paths = [str(Path(vineppo.__file__).parents[1]), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launched = ["-m", *LAUNCHERS[launcher].split(), str(count)] if count > 1 else []
    program = [str(script)] if script else ["-m", "vineppo", "train"]
    command = [sys.executable, *launched, *program, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(count: int, *arguments: str, script: Path | None = None, launcher: str = "torchrun") -> str:
    """Run to the end, and return the output."""
    process = start(count, *arguments, script=script, launcher=launcher)
    try:
        output, _ = process.communicate(timeout=1800)  # on a busy machine
    except subprocess.TimeoutExpired:
        process.terminate()  # The launcher ends the others.
        raise
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
LORA = ["--algorithm", "reinforce", "--model.lora.r", "4", "--learner.minibatch_size", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory with the results of one process, and of one launch of 2 and one of 3 processes.

    - `0-2.pt` and so on: the updates of the cases of benchmarks/ranks.py (number of the case, number of processes).
    - `vineppo-one` and `ppo-one`: four iterations of one process. `vineppo-many`, `ppo-many`: two iterations with 2
      processes, one more with 3, and one more with 1.
    - `lora-one`: three iterations of one process. `lora-many`: one with 1 and two with 3.
    - `script-1`, `script-2`: SCRIPT with one process and with 2.
    """
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    cases = Thing("cases", "cases", list(CASES))

    def new(name: str, iterations: int, *arguments: str) -> Thing:
        return Thing(name, "train", [*arguments, "--run.iterations", str(iterations), "--run.dir", str(folder / name)])

    def resumed(name: str, iterations: int) -> Thing:
        return Thing(name, "train", ["--resume", str(folder / name), "--run.iterations", str(iterations)])

    def script(count: int) -> Thing:
        return Thing("script", "script", [str(folder / "script.py"), str(folder / f"script-{count}")])

    of = {name: [*SMALL, "--algorithm", name] for name in ("vineppo", "ppo")}
    prepare(folder, list(CASES))
    alone = [new(f"{name}-one", 4, *arguments) for name, arguments in of.items()]
    ranks_program.run(
        folder, [*alone, new("lora-one", 3, *SMALL, *LORA), new("lora-many", 1, *SMALL, *LORA), script(1)]
    )
    launch(folder, 2, [cases, *(new(f"{name}-many", 2, *arguments) for name, arguments in of.items()), script(2)])
    for name in of:
        checkpoint = folder / f"{name}-many" / "checkpoints" / "000002"
        assert (checkpoint / "learner" / "__1_0.distcp").is_file()
        assert bool(read_networks(checkpoint)["critic"]) == (name == "ppo")
    launch(folder, 3, [cases, *(resumed(f"{name}-many", 3) for name in of), resumed("lora-many", 3)])
    ranks_program.run(folder, [resumed(f"{name}-many", 4) for name in of])
    return folder


def launch(folder: Path, count: int, things: list[Thing]) -> None:
    """Let several processes do things one after another."""
    train(count, str(folder), json.dumps(things), script=Path(ranks_program.__file__))


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_one_process(folder: Path, case: str) -> None:
    """Every algorithm, full and LoRA, with a critic, KL, entropy, dropout, checkpointing and bfloat16.

    The weights agree to 1e-6 after eight updates. With bfloat16, and where gradients are sums that cancel, they agree
    as well as those of one process with other micro-batches.
    """
    allowed = 0.02 if case in ROUNDED else 1e-6
    found = compared(folder, list(CASES).index(case), case, (2, 3), enough=allowed)
    assert found["change"] > 1e-4  # the updates did something
    if CONTROL in found and case not in ROUNDED:
        allowed = max(allowed, 4 * of_weights(found[CONTROL]))
    assert max(of_weights(found[count]) for count in ("2", "3")) <= allowed, found


@pytest.mark.parametrize("algorithm", ["vineppo", "ppo"])
def test_a_run_goes_on_with_another_number_of_processes(folder: Path, algorithm: str) -> None:
    """Two iterations with 2 processes, one more with 3, and one more with 1 are four iterations with 1."""
    one, many = folder / f"{algorithm}-one", folder / f"{algorithm}-many"
    output = printed(folder, many.name, 2)
    assert "2 processes" in output[0] and output[0].count("iteration 2/2") == 1 and "iteration" not in output[1]
    assert printed(folder, many.name, 3)[1:] == ["", ""]
    assert (many / "checkpoints" / "000003" / "learner" / "__2_0.distcp").is_file()
    assert (many / "checkpoints" / "000004" / "learner.pt").is_file()
    assert responses(one) == responses(many)
    assert distance(one, many) < 1e-6


def test_a_run_of_one_process_goes_on_with_three(folder: Path) -> None:
    """With LoRA: the frozen weights are not in the checkpoint. The last minibatch of one rollout is smaller than W."""
    assert "3 processes" in printed(folder, "lora-many", 3)[0]
    assert responses(folder / "lora-one") == responses(folder / "lora-many")
    assert distance(folder / "lora-one", folder / "lora-many") < 2e-6


def result(outputs: list[str]) -> list[str]:
    """Return the lines of the results of SCRIPT."""
    return [line for output in outputs for line in output.splitlines() if line.startswith("result")]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_trainer_does_the_same_in_every_process(folder: Path, tmp_path: Path, launcher: str) -> None:
    """The model of the script is trained on every rank, and files are written once."""
    one = result(printed(folder, "script", 1))
    run, outputs = folder / "script-2", printed(folder, "script", 2)
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
        run = tmp_path / "run"
        outputs = [train(2, str(run), script=folder / "script.py", launcher=launcher)]
    assert len(one) == 1 and result(outputs) == one * 2
    assert distance(folder / "script-1", run) < 1e-6
    saved = [load_file(path / "model.safetensors") for path in (folder / "script-1-saved", Path(f"{run}-saved"))]
    assert all(float((saved[0][name] - saved[1][name]).abs().max()) < 1e-6 for name in saved[0])
