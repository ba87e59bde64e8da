"""Runs with a credit function that does not return exactly one sample per rollout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.helpers import small_config, weights_hash
from tests.training.test_train import Crash, CrashAt, read_lines, without_seconds
from vineppo.config.schema import Config, LearnerConfig, RunConfig
from vineppo.credit import BUILT_IN
from vineppo.credit.algorithm import CreditParts
from vineppo.credit.reinforce import REINFORCE
from vineppo.credit.sample import reward_of
from vineppo.training.loop import resume, train
from vineppo.types import CreditFn, Metrics, RolloutGroup, TrainingSample

Change = Callable[[list[TrainingSample], int], list[TrainingSample]]
LEARNER = LearnerConfig(lr=1e-4, minibatch_size=8, epochs=3, decay="linear")


def with_credit(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Replace REINFORCE by a variant that changes its samples before it returns them."""

    def build(settings: Any, parts: CreditParts) -> CreditFn:
        credit = REINFORCE.build(settings, parts)

        def changed(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
            samples, metrics = credit(groups, iteration)
            return change(samples, iteration), metrics

        return changed

    monkeypatch.setitem(BUILT_IN, "reinforce", replace(REINFORCE, build=build))


def only_rewarded(samples: list[TrainingSample], iteration: int) -> list[TrainingSample]:
    """Keep the samples with a reward, in reverse order; in the second iteration return none."""
    rewarded = [sample for sample in reversed(samples) if sample.rollout and reward_of(sample.rollout) > 0]
    return rewarded if iteration != 2 else []


def config_of(path: Path, **run: Any) -> Config:
    settings: dict[str, Any] = {"dir": str(path), "iterations": 4, "checkpoint_every": 1, **run}
    return small_config(path, "reinforce", learner=LEARNER, run=RunConfig(**settings))


def test_a_run_that_trains_on_rewarded_rollouts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is 4 iterations with 3 epochs of 2 updates. The second iteration makes none of its 6 updates."""
    with_credit(monkeypatch, only_rewarded)
    summary = train(config_of(tmp_path / "whole"))
    lines = read_lines(tmp_path / "whole")
    assert [line["updates"] for line in lines] == [0, 6, 6, 12, 18] and summary["updates"] == 18
    rates = [1e-4 * (1 - u / 24) for u in range(24)]
    assert lines[3]["policy/lr"] == pytest.approx(sum(rates[12:18]) / 6)
    assert lines[4]["policy/lr"] == pytest.approx(sum(rates[18:]) / 6)
    assert "policy/lr" not in lines[2] and lines[2]["reward/mean"] > 0

    trained_tokens = [0]
    for iteration in range(1, 5):
        rows = pq.read_table(tmp_path / f"whole/rollouts/{iteration:06d}.parquet").to_pylist()
        assert len(rows) == 16 and {row["kind"] for row in rows} == {"rollout"}
        for row in rows:
            trained = iteration != 2 and row["reward"] > 0
            assert len(row["token_advantages"]) == trained * row["num_tokens"] and row["token_weights"] == []
        trained_tokens.append(trained_tokens[-1] + sum(len(row["token_advantages"]) for row in rows))
    assert [line["tokens/trained"] for line in lines] == [3 * tokens for tokens in trained_tokens]
    assert 0 < summary["tokens"]["trained"] < 3 * summary["tokens"]["rollouts"]


def test_it_resumes_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_credit(monkeypatch, only_rewarded)
    train(config_of(tmp_path / "whole"))
    with pytest.raises(Crash):
        train(config_of(tmp_path / "cut"), reporter=CrashAt(3))
    newest = tmp_path / "cut/checkpoints/000002"
    assert sorted(p.name for p in newest.iterdir()) == ["learner.pt", "manifest.json", "state.pt"]
    assert sorted(json.loads((newest / "manifest.json").read_text())["files"]) == ["learner.pt", "state.pt"]
    assert (newest / "state.pt").stat().st_size < 20_000 < (newest / "learner.pt").stat().st_size
    resume(config_of(tmp_path / "cut"))
    assert weights_hash(tmp_path / "cut/final") == weights_hash(tmp_path / "whole/final")
    lines, expected = (map(without_seconds, read_lines(tmp_path / name)) for name in ("cut", "whole"))
    assert list(lines) == list(expected)


def test_max_updates_counts_minibatches_without_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear decay then reaches 0 at the end of the run."""
    with_credit(monkeypatch, only_rewarded)
    summary = train(config_of(tmp_path / "run", iterations=50, max_updates=18))
    assert (summary["finish_reason"], summary["iterations"], summary["updates"]) == ("updates", 3, 12)


def test_samples_in_addition_to_the_rollouts_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each response is two samples: the first trains its first half, the second the other half."""

    def halves(samples: list[TrainingSample], iteration: int) -> list[TrainingSample]:
        out = []
        for sample in samples:
            assert sample.rollout is not None
            prompt = len(sample.rollout.prompt_ids)
            middle = prompt + (len(sample.token_ids) - prompt + 1) // 2
            first = {name: getattr(sample, name)[:middle] for name in ("token_ids", "loss_mask", "advantages")}
            start = replace(sample, **first, sampler_logprobs=sample.sampler_logprobs[:middle], rollout=None)
            mask = tuple(int(trained and i >= middle) for i, trained in enumerate(sample.loss_mask))
            out += [start, replace(sample, loss_mask=mask)]
        return out

    settings: dict[str, Any] = {"iterations": 1, "checkpoint_every": 0}
    plain = train(config_of(tmp_path / "plain", **settings))
    with_credit(monkeypatch, halves)
    summary = train(config_of(tmp_path / "run", **settings))
    assert summary["updates"] == plain["updates"] == 6 and summary["tokens"] == plain["tokens"]
    (_, expected), (_, metrics) = read_lines(tmp_path / "plain"), read_lines(tmp_path / "run")
    for metric in ("policy/entropy", "credit/advantage_abs_mean", "policy/sampler_logprob_gap"):
        assert metrics[metric] == pytest.approx(expected[metric], rel=1e-4)
    rows = pq.read_table(tmp_path / "run/rollouts/000001.parquet").to_pylist()
    before = pq.read_table(tmp_path / "plain/rollouts/000001.parquet").to_pylist()
    assert [row["kind"] for row in rows] == ["rollout"] * 16 + ["sample"] * 16
    for whole, second, first in zip(before, rows[:16], rows[16:], strict=True):
        assert second["response_ids"] == whole["response_ids"]
        assert first["response_ids"] == whole["response_ids"][: first["num_tokens"]]
        assert second["problem_id"] == first["problem_id"] == whole["problem_id"]
        assert second["token_weights"] == [0.0] * first["num_tokens"] + [1.0] * (
            whole["num_tokens"] - first["num_tokens"]
        )
        assert (first["reward"], first["token_weights"]) == (None, [])
