"""RestEM: which responses are kept, the restart from the starting model, and complete runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers import small_config, weights_hash
from tests.world import build_world, flat_gradient
from vineppo.cli.main import main
from vineppo.compare.records import load_run
from vineppo.config.offline import OfflineConfig
from vineppo.config.schema import ModelConfig
from vineppo.config.settings import replace
from vineppo.model.policy import Policy
from vineppo.run.directory import RunDirectory
from vineppo.tasks import build_task
from vineppo.training import restem
from vineppo.training.dpo import response_logprobs
from vineppo.training.loop import train
from vineppo.training.offline import OfflineSession, run_offline
from vineppo.training.restem import kept_responses, train_in_rounds
from vineppo.training.supervised import Demonstration, accumulate
from vineppo.types import Problem, Rollout, RolloutGroup, UserError


def offline_config(run_dir: Path, **sections: Any) -> OfflineConfig:
    """Return the configuration of a run that takes a few seconds: two rounds with short problems of the task `chain`.

    Args:
        sections: name of a field or section -> its settings.
    """
    values: dict[str, Any] = {
        "model": {"path": "embedded:judgement"},
        "task": {"num_steps": 3},
        "rollouts": {"num_problems": 6, "group_size": 4, "max_new_tokens": 40},
        "restem": {"rounds": 2, "max_kept": 2, "epochs": 2},
        "eval": {"num_problems": 8, "final_num_problems": 16},
        "run": {"dir": str(run_dir)},
        "batch_size": 4,
        **sections,
    }
    return OfflineConfig(**values)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the durations, which differ from run to run."""
    lines = RunDirectory.open(run_dir).read_metrics()
    return [{key: value for key, value in line.items() if not key.startswith("seconds/")} for line in lines]


def rollout(text: str, reward: float | None, response_ids: tuple[int, ...] = (3, 4)) -> Rollout:
    return Rollout((1, 2), response_ids, (-1.0,) * len(response_ids), "stop", text, reward)


def group(problem_id: str, *rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(Problem(id=problem_id, prompt="p"), rollouts)


def letters(kept: Sequence[Demonstration]) -> Counter[int]:
    """Count the kept responses by their first token."""
    return Counter(ids[start] for ids, start in kept)


# --- which responses are kept


def test_different_right_responses_are_kept_before_repeated_ones() -> None:
    """By hand: three times a, once b, once c are right; d is wrong, and e has no reward."""
    right = [rollout("a", 1.0, (10, 0))] * 3 + [rollout("b", 1.0, (11, 0)), rollout("c", 1.0 - 1e-12, (12, 0))]
    groups = [group("train/0", *right, rollout("d", 0.5, (13, 0)), rollout("e", None, (14, 0)))]
    for seed in range(20):
        kept = {count: letters(kept_responses(groups, 1.0, count, (seed,))) for count in (1, 2, 3, 4, 5, 9)}
        assert [sum(kept[count].values()) for count in kept] == [1, 2, 3, 4, 5, 5]
        assert max(kept[2].values()) == 1
        assert kept[3] == {10: 1, 11: 1, 12: 1}
        assert kept[4] == {10: 2, 11: 1, 12: 1}
        assert kept[9] == {10: 3, 11: 1, 12: 1}
    assert letters(kept_responses(groups, 0.5, 9, (0,)))[13] == 1


def test_the_seed_selects_responses_and_every_response_can_be_selected() -> None:
    groups = [group("train/0", *(rollout(str(token), 1.0, (token,)) for token in range(8)))]
    chosen = [letters(kept_responses(groups, 1.0, 2, (seed,))) for seed in range(40)]
    assert chosen == [letters(kept_responses(groups, 1.0, 2, (seed,))) for seed in range(40)]
    assert {token for kept in chosen for token in kept} == set(range(8))


def test_the_limit_applies_to_a_problem_and_token_ids_are_those_that_were_sampled() -> None:
    """The groups of a problem that was drawn twice count together. No token is added to a response without EOS."""
    groups = [
        group("train/0", rollout("a", 1.0, (10, 0)), rollout("b", 0.0)),
        group("train/1", rollout("a", 1.0, (10,))),
        group("train/0", rollout("b", 1.0, (11, 0)), rollout("c", 1.0, (12, 0))),
    ]
    kept = kept_responses(groups, 1.0, 2, (0,))
    assert len(kept) == 3 and all(start == 2 and ids[:2] == (1, 2) for ids, start in kept)
    assert ((1, 2, 10), 2) in kept


# --- the loss


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_the_gradient_is_that_of_the_cross_entropy_at_the_sampling_temperature(reduction: Any, max_tokens: int) -> None:
    """The exact log-probabilities are those of the enumerable world, whose temperature is 0.7."""
    world = build_world(3)
    chosen = [0, 7, 20, 30]
    counts = torch.tensor([len(world.responses[i]) for i in chosen], dtype=torch.float64)
    sums = world.token_logprobs()[chosen].sum(1)
    expected = -sums.sum() / counts.sum() if reduction == "token_mean" else -(sums / counts).mean()
    gradient = flat_gradient(expected, world.policy)
    batch = [(world.prompt_ids + world.responses[i], len(world.prompt_ids)) for i in chosen]
    loss, tokens = accumulate(world.policy, batch, max_tokens, world.temperature, reduction)
    found = torch.cat([p.grad.reshape(-1) for p in world.policy.model.parameters()])
    assert len(set(counts.tolist())) > 1 and tokens == counts.sum()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert (found - gradient).norm() < 1e-5 * gradient.norm()


# --- the restart


def session_of(config: OfflineConfig) -> OfflineSession:
    policy = Policy.load(config.model)
    run = RunDirectory.create(config.run.dir, config)
    task = build_task(config.task, policy.codec.chat_prompt)
    return OfflineSession(config, policy, task, run, lambda line: None, {}, 0.0)


def test_each_round_samples_with_the_last_policy_and_trains_the_starting_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second round without updates therefore ends with the starting model, bit for bit."""
    config = offline_config(tmp_path / "run")
    session = session_of(config)
    start = restem.weights_of(session.policy.model)
    sampled, tuned = [], []
    sample, tune = restem.sample_round, restem.fine_tune

    def is_start() -> bool:
        weights = session.policy.model.state_dict()
        return all(torch.equal(weights[name], tensor) for name, tensor in start.items())

    def sample_round(session: OfflineSession, iteration: int) -> Any:
        sampled.append(is_start())
        return sample(session, iteration)

    def fine_tune(session: OfflineSession, kept: Any, iteration: int) -> Any:
        tuned.append(is_start())
        return tune(session, kept, iteration) if iteration == 1 else {"restem/loss": 0.0}

    monkeypatch.setattr(restem, "sample_round", sample_round)
    monkeypatch.setattr(restem, "fine_tune", fine_tune)
    train_in_rounds(session)
    assert sampled == [True, False] and tuned == [True, True]
    assert is_start()


def test_the_restart_removes_trained_adapters(tmp_path: Path) -> None:
    config = offline_config(tmp_path / "run", model={"path": "embedded:judgement", "lora": {"r": 2}}, lr=1e-2)
    session = session_of(config)
    before = restem.weights_of(session.policy.model)
    assert before and all("lora" in name for name in before)
    train_in_rounds(session)
    after = restem.weights_of(session.policy.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    restem.load_trained_state(session.policy.model, before)
    assert all(torch.equal(before[name], tensor) for name, tensor in restem.weights_of(session.policy.model).items())


# --- complete runs


def test_a_run_counts_tokens_and_updates_and_raises_the_probability_of_kept_responses(tmp_path: Path) -> None:
    config = offline_config(tmp_path / "run", restem={"rounds": 1, "max_kept": 3, "epochs": 4}, lr=3e-4)
    config = replace(config, rollouts=replace(config.rollouts, num_problems=8))
    summary = run_offline(config, "small", lambda line: None)
    before, line = lines_of(tmp_path / "run")
    rows = pq.read_table(tmp_path / "run" / "rollouts" / "000001.parquet").to_pylist()
    assert len(rows) == 32
    right = Counter(row["problem_id"] for row in rows if row["reward"] == 1)
    kept = sum(min(3, count) for count in right.values())
    assert 4 < kept < 32 and line["restem/kept"] == kept
    assert line["restem/solved_share"] == len(right) / 8
    assert line["updates"] == summary["updates"] == 4 * -(-kept // 4)
    generated = sum(row["num_tokens"] for row in rows)
    assert line["tokens/generated"] == line["tokens/rollouts"] == summary["tokens"]["generated"] == generated
    assert line["reward/mean"] == sum(right.values()) / 32
    assert {"eval/accuracy", "eval/accuracy_low", "tokens/trained", "response/length_mean"} <= set(line)
    assert before["updates"] == before["tokens/generated"] == 0 and "eval/accuracy" in before
    # The same round again: the responses do not depend on the training.
    session = session_of(replace(config, run=replace(config.run, dir=str(tmp_path / "again"))))
    groups, _ = restem.sample_round(session, 1)
    demonstrations = kept_responses(groups, 1.0, 3, (0, 1))
    assert line["tokens/trained"] == 4 * sum(len(ids) - start for ids, start in demonstrations)
    final = Policy.load(ModelConfig(path=str(tmp_path / "run" / "final")))
    old, new = (sum(response_logprobs(p, demonstrations, 4096, 1.0).values()) for p in (session.policy, final))
    assert new > old + 1
    assert line["restem/loss"] < -old / sum(len(ids) - start for ids, start in demonstrations)


def test_a_seed_gives_the_same_run(tmp_path: Path) -> None:
    configs = [
        offline_config(tmp_path / name, run={"dir": str(tmp_path / name), "seed": seed})
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    for config in configs:
        run_offline(config, report=lambda line: None)
    hashes = [weights_hash(tmp_path / name / "final") for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b") != lines_of(tmp_path / "c")


def test_the_size_of_micro_batches_does_not_change_the_number_of_updates_or_tokens(tmp_path: Path) -> None:
    for name, tokens in (("a", 64), ("b", 16384)):
        config = offline_config(tmp_path / name, micro_batch_tokens=tokens, restem={"rounds": 1, "epochs": 1})
        run_offline(config, report=lambda line: None)
    a, b = (lines_of(tmp_path / name)[1] for name in "ab")
    assert (a["updates"], a["tokens/trained"]) == (b["updates"], b["tokens/trained"])
    assert a["restem/loss"] == pytest.approx(b["restem/loss"], rel=1e-4)


def test_the_first_evaluation_and_the_first_rewards_are_those_of_a_training_run(tmp_path: Path) -> None:
    """The same problems and the same seeds are used, so that curves of both start at the same point."""
    config = small_config(tmp_path / "train", "grpo")
    config = replace(config, eval=replace(config.eval, every=1), run=replace(config.run, iterations=1))
    train(config)
    rollouts = {"num_problems": 4, "group_size": 4, "max_new_tokens": 40}
    run_offline(offline_config(tmp_path / "offline", rollouts=rollouts), report=lambda line: None)
    online, offline = lines_of(tmp_path / "train"), lines_of(tmp_path / "offline")
    assert online[0]["eval/accuracy"] == offline[0]["eval/accuracy"]
    keys = ("reward/mean", "reward/std", "tokens/generated", "response/length_mean", "grader/graded")
    assert [online[1][key] for key in keys] == [offline[1][key] for key in keys]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("train", "offline")]
    assert summaries[0]["accuracy_before"] == summaries[1]["accuracy_before"]
    assert set(summaries[0]) == set(summaries[1])


def test_other_commands_read_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "run"
    run_offline(offline_config(folder), "small", lambda line: None)
    request.getfixturevalue("drawn_figures")
    assert main(["plot", str(folder)]) == 0
    assert len(list((folder / "plots").glob("*.png"))) == 3
    assert main(["report", str(folder)]) == 0
    assert "Columns: step, no credit." in (folder / "report.md").read_text()
    record = load_run(folder)
    assert (record.arm, record.level, len(record.evaluations)) == ("restem", "judgement", 3)
    assert record.evaluations[-1].tokens == record.summary["tokens"]["generated"]
    assert main(["eval", str(folder), "--num_problems", "4", "--num_samples", "1"]) == 0
    assert main(["train", "--run.dir", str(tmp_path / "next"), "--model.path", str(folder), "--resume", "x"]) == 2
    capsys.readouterr()
    assert main(["train", "--resume", str(folder)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- mistakes


def test_a_round_without_a_right_response_is_an_error_and_leaves_no_directory(tmp_path: Path) -> None:
    config = offline_config(tmp_path / "run", reward_threshold=2.0)
    with pytest.raises(UserError, match=r"round 1: none of 24 responses is right \(reward at least 2\), so there is"):
        run_offline(config, report=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_later_round_without_a_right_response_keeps_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = restem.sample_round

    def sample_round(session: OfflineSession, iteration: int) -> Any:
        groups, metrics = sample(session, iteration)
        if iteration == 2:
            groups = [RolloutGroup(g.problem, tuple(replace_fields(r, reward=0.0) for r in g.rollouts)) for g in groups]
        return groups, metrics

    monkeypatch.setattr(restem, "sample_round", sample_round)
    with pytest.raises(UserError, match="round 2: none of 24 responses is right"):
        run_offline(offline_config(tmp_path / "run"), report=lambda line: None)
    assert [line["iteration"] for line in lines_of(tmp_path / "run")] == [0, 1]
