"""Reading the responses of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.helpers import ROOT, weights_hash
from tests.view.conftest import trained
from tests.view.rows import responses, row, run_with
from vineppo.config.schema import Config, RunConfig
from vineppo.run.directory import RunDirectory
from vineppo.types import UserError
from vineppo.view.records import interval_of, iterations_of, line_ends, response_of, responses_of


def test_a_real_run_is_read_completely(vineppo_run: Path) -> None:
    assert iterations_of(vineppo_run) == [1, 2]
    for iteration in (1, 2):
        found = responses_of(vineppo_run, iteration)
        assert [response.number for response in found] == [1, 2, 3, 4, 5, 6]
        for response in found:
            assert (response.iteration, response.kind, response.credit) == (iteration, "rollout", "values")
            assert "".join(token.text or "" for token in response.tokens) == response.text
            assert "".join(step.text for step in response.steps) == response.text
            assert all(token.entropy is not None and token.entropy >= 0 for token in response.tokens)
            assert [step.start for step in response.steps[1:]] == [step.end for step in response.steps[:-1]]
            for step in response.steps:
                assert step.value is not None and step.interval is not None
                assert step.interval.low <= step.value <= step.interval.high
                change = response.value_change(step)
                assert change == pytest.approx(step.advantage, abs=1e-12)
            assert response.character(len(response.tokens)) == len(response.text)
        assert found[2] == response_of(vineppo_run, iteration, 3)


def test_values_follow_from_the_saved_continuations(vineppo_run: Path) -> None:
    """With reuse, the K continuations at a state are all that start at it or before it and reach it."""
    checked = 0
    for iteration in (1, 2):
        found = responses_of(vineppo_run, iteration)
        assert all(not response.continuations for response in found[4:])
        for response in found[:4]:
            for step in response.steps:
                rewards = [c.reward for c in response.continuations if c.state <= step.start <= c.state + c.shared]
                assert len(rewards) == step.num_mc_rollouts == 5
                assert sum(reward or 0.0 for reward in rewards) / 5 == pytest.approx(step.value, abs=1e-12)
                checked += 1
            for c in response.continuations:
                start, leaves = response.character(c.state), response.character(c.state + c.shared)
                assert start is not None and leaves is not None
                assert c.text.startswith(response.text[start:leaves])
                assert (c.shared == c.num_tokens) <= (c.text == response.text[start:])
    assert checked > 20


def test_values_follow_from_new_continuations_of_every_state(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "vineppo", reuse=False)
    for response in responses_of(run, 1):
        for step in response.steps:
            rewards = [c.reward or 0.0 for c in response.continuations if c.state == step.start]
            assert len(rewards) == 5 and sum(rewards) / 5 == pytest.approx(step.value, abs=1e-12)


def test_continuations_of_bisection_start_at_evaluated_states(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "vineppo", bisection=True, num_mc_rollouts=9)
    for response in responses_of(run, 1):
        starts = {c.state for c in response.continuations}
        assert {step.start for step in response.steps if step.num_mc_rollouts} >= starts and 0 in starts


def test_continuations_of_counterfactual_credit_replace_one_token(counterfactual_run: Path) -> None:
    """Where the reward falls, the credit is positive; everywhere else it is 0."""
    branches = 0
    for response in responses_of(counterfactual_run, 1):
        assert response.credit == "tokens" and all(step.value is None for step in response.steps)
        fallen = {c.state for c in response.continuations if (c.reward or 0.0) < (response.reward or 0.0)}
        assert fallen == {i for i, token in enumerate(response.tokens) if token.advantage}
        for c in response.continuations:
            assert c.shared == 0 and c.accepted is not None and 0 <= c.accepted < c.num_tokens
            branches += 1
        assert [step.advantage for step in response.steps] == [
            pytest.approx(sum(t.advantage or 0.0 for t in response.tokens[step.start : step.end]))
            for step in response.steps
        ]
        assert all(step.text.endswith("\n") for step in response.steps[:-1])
    assert branches


def test_saving_continuations_changes_no_result(tmp_path: Path) -> None:
    runs = [trained(tmp_path / str(keep), "vineppo", keep=keep, num_mc_rollouts=2) for keep in (0, 6)]
    lines = [
        [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds")} for line in text.splitlines()]
        for text in ((run / "metrics.jsonl").read_text() for run in runs)
    ]
    assert weights_hash(runs[0] / "final") == weights_hash(runs[1] / "final") and lines[0] == lines[1]
    without, with_them = (responses_of(run, 2) for run in runs)
    assert all(response.continuations for response in with_them)
    assert without == [replace(response, continuations=()) for response in with_them]


def test_files_of_earlier_versions_can_be_read(vineppo_run: Path, counterfactual_run: Path, tmp_path: Path) -> None:
    new = ("token_ends", "token_entropies", "token_values", "continuations")
    for source in (vineppo_run, counterfactual_run):
        run = RunDirectory.create(tmp_path / source.name, Config())
        pq.write_table(pq.read_table(source / "rollouts/000001.parquet").drop_columns(list(new)), run.rollouts_of(1))
        for old, now in zip(responses_of(run.path, 1), responses_of(source, 1), strict=True):
            assert {(t.text, t.entropy, t.value) for t in old.tokens} == {(None, None, None)}
            assert [t.advantage for t in old.tokens] == [t.advantage for t in now.tokens]
            assert old.continuations == () and old.character(1) is None
            if now.credit == "values":
                assert old.steps == now.steps
            else:  # without the texts of tokens, the response is one step
                [step] = old.steps
                assert step.text == old.text and step.advantage == pytest.approx(
                    sum(s.advantage or 0 for s in now.steps)
                )


def test_the_interval_of_a_value() -> None:
    """Wilson's interval by hand: for 0 of 9 it is 0 to z^2 / (9 + z^2)."""
    z2 = 1.959963984540054**2
    low = interval_of(0.0, 9)
    assert low is not None and low.low == 0.0 and low.high == pytest.approx(z2 / (9 + z2))
    half = interval_of(0.5, 4)
    assert half is not None and half.high - 0.5 == pytest.approx(0.5 - half.low)
    known = interval_of(0.25, 0)
    assert known is not None and (known.low, known.high) == (0.25, 0.25)
    assert interval_of(1.5, 9) is None and interval_of(0.5, 9, unit=False) is None


def test_values_have_no_interval_if_a_reward_is_outside_0_to_1() -> None:
    lines = ["a\n", "b"]
    first, _ = responses(row(lines, 1.0, [0.5, 0.25]), row(lines, 0.0, [0.5, 0.25]))
    assert all(step.interval for step in first.steps)
    first, _ = responses(row(lines, 1.0, [0.5, 0.25]), row(lines, -1.0, [0.5, 0.25]))
    assert [step.interval for step in first.steps] == [None, None]


def test_values_of_a_value_network_are_read() -> None:
    predicted = [0.5, 0.25, 0.75, 1.0]
    [response] = responses(row(["a\n", "b\n"], 1.0, advantages=[0.5, 0.25, -0.5, 0.0], token_values=predicted))
    assert [step.value for step in response.steps] == [0.5, 0.75] and response.credit == "tokens"
    assert [step.advantage for step in response.steps] == [0.75, -0.5]
    assert [step.num_mc_rollouts for step in response.steps] == [None, None]


@pytest.mark.parametrize(
    ("texts", "ends"),
    [
        ([], []),
        (["a", "\n", "b"], [2, 3]),
        (["a", "\n", ""], [3]),  # an end-of-sequence token alone is no line
        (["a", "\nb", "\n\n", "c", " "], [2, 3, 5]),
        (["\n"], [1]),
        ([None, None], [2]),
    ],
)
def test_the_ends_of_lines(texts: list[str | None], ends: list[int]) -> None:
    assert line_ends(texts) == ends


def test_a_rollout_without_credit(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {name: [] for name in ("token_advantages", "step_texts", "step_ends", "values")}
    run_with(tmp_path / "run", row(["a\n", "b"], None, advantages=[], **nothing))
    [response] = responses_of(tmp_path / "run", 1)
    assert response.credit == "none" and response.reward is None
    assert [(step.advantage, step.token_sum, step.value) for step in response.steps] == [(None, None, None)] * 2


def refusal(path: Path, iteration: int = 1, number: int | None = None) -> str:
    with pytest.raises(UserError) as error:
        responses_of(path, iteration) if number is None else response_of(path, iteration, number)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_mistakes_are_explained(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", row(["a"], 1.0, [0.5]))
    for iteration in (2, 3, 7):
        run_with(run, row(["a"], 1.0, [0.5]), iteration=iteration)
    assert refusal(run, 5) == f"{run} has no responses of iteration 5; it has 1 to 3, 7"
    assert refusal(run, 1, 2) == f"iteration 1 of {run} has no response 2; it has the responses 1 to 1"
    assert "no run directory" in refusal(tmp_path / "nowhere")
    new = RunDirectory.create(tmp_path / "new", Config())
    assert refusal(new.path) == f"{new.path} has saved no responses yet; wait for the end of its first iteration"
    off = RunDirectory.create(tmp_path / "off", Config(run=RunConfig(save_rollouts=False)))
    assert "because run.save_rollouts is false" in refusal(off.path)
    [response] = responses_of(run, 1)
    with pytest.raises(UserError, match="response 1 of iteration 1 has no step 2; it has the steps 1 to 1"):
        response.step(2)


@pytest.mark.parametrize(
    "damage",
    [
        {"step_ends": [2, 1]},
        {"step_ends": [1, 9]},
        {"values": [0.5]},
        {"sampler_logprobs": [-1.0]},
        {"token_ends": [1]},
        {"response": None},
    ],
)
def test_rows_that_do_not_fit_together_are_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    run = run_with(tmp_path / "run", {**row(["a\n", "b"], 1.0, [0.5, 0.25]), **damage})
    assert "000001.parquet is damaged or not a file of rollouts" in refusal(run)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", row(["a\n", "b"], 1.0, [0.5, 0.25]))
    path = run / "rollouts/000001.parquet"
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:40] + whole[80:]):
        path.write_bytes(content)
        assert "000001.parquet is damaged or not a file of rollouts" in refusal(run)


def test_reading_needs_no_pytorch() -> None:
    code = "import sys; import vineppo.view.records, vineppo.view.queues, vineppo.view.terminal; "
    code += "sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
