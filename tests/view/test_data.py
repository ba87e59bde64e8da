"""The data of the credit viewer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.view.rows import responses, row, run_with
from vineppo.credit.tempo import leave_one_out_tree
from vineppo.view.data import (
    compressed,
    iteration_data,
    parts_of,
    ranges,
    rounded,
    run_meta,
    runs_of,
    spread_order,
    to_json,
    token_texts,
)
from vineppo.view.records import responses_of


def expanded(runs: list[Any]) -> list[Any]:
    return [value for value, count in zip(runs[::2], runs[1::2], strict=True) for _ in range(count)]


def with_ids(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose token ids are the code points, so that responses with equal starts share tokens."""
    return {**row, "response_ids": [ord(c) for c in row["response"]]}


def test_a_response_by_hand() -> None:
    parts = parts_of(responses(row(["ab\n", "c"], 1.0, [1 / 3, 2 / 3])), 7)
    assert parts["rows"] == {
        "iteration": 7,
        "count": 1,
        "kind": [],
        "problem": ["train/3"],
        "preview": ["a=1;k?"],
        "reward": [1],
        "finish": ["stop"],
        "tokens": [4],
        "steps": [2],
        "lowest": [0.333],
        "continuations": [0],
        "queues": {"drops": [], "lucky": [], "truncated": [], "disagree": []},
    }
    assert parts["core"]["problems"] == [["train/3", "a=1;k?", "1"]]
    [entry] = parts["core"]["responses"]
    assert [parts["core"]["texts"][t] for t in entry["t"]] == ["a", "b", "\n", "c"]
    assert entry["a"] == [0.333333, 4] and entry["credit"] == "values" and entry["others"] == {}
    steps = entry["s"]
    assert steps["end"] == [3, 4] and steps["v"] == [0.333333, 0.666667] and steps["k"] == [9, 9]
    assert steps["a"] == [0.333333, 0.333333] and steps["sum"] == [1, 0.333333]
    assert (steps["lo"][0], steps["hi"][0]) == (0.1206, 0.6458)  # Wilson, 3 of 9
    assert parts["tokens"]["responses"] == [{"lp": [-500, -500, -500, -500]}]
    assert parts["more"]["responses"] == [[]]


def test_the_queues_name_the_step_and_the_reason() -> None:
    fallen = row(["a\n", "b\n", "c"], 0.0, [0.2, 0.9, 0.1])
    lucky = row(["a\n", "b\n", "c"], 1.0, [0.8, 0.1, 0.9])
    cut = row(["a"], 0.0, [0.0], finish_reason="length")
    queues = parts_of(responses(fallen, lucky, cut), 1)["rows"]["queues"]
    assert [(i, step, key) for i, step, _, key in queues["drops"]] == [(0, 2, -0.8), (1, 1, -0.7)]
    assert queues["drops"][0][2] == "value 0.90 to 0.10 (-0.80)"
    assert [(i, step, key) for i, step, _, key in queues["lucky"]] == [(1, 1, 0.1)]
    assert [(i, step) for i, step, *_ in queues["truncated"]] == [(2, None)]


def test_continuations_are_saved_without_the_text_that_they_share() -> None:
    def continuation(state: int, shared: int, text: str, reward: float) -> dict[str, Any]:
        length = len(text)
        return {
            "state": state, "shared": shared, "accepted": None, "num_tokens": length, "text": text, "reward": reward,
            "finish_reason": "stop",
        }  # fmt: skip

    entries = [continuation(0, 2, "abX", 0.0), continuation(2, 0, "Y", 1.0), continuation(1, 1, "?", 0.5)]
    parts = parts_of(responses(row(["ab", "c"], 1.0, [0.5, 0.5], continuations=entries)), 1)
    assert parts["more"]["responses"] == [
        [
            [0, 2, None, 3, 2, "X", 0, "stop"],
            [2, 0, None, 1, 2, "Y", 1, "stop"],
            [1, 1, None, 1, None, "?", 0.5, "stop"],  # does not begin like the response: the whole text is kept
        ]
    ]


def test_other_credits_come_from_the_rewards_and_tokens_of_the_group() -> None:
    group = [with_ids(row([text], reward, [0.5])) for text, reward in (("abc", 1.0), ("abd", 0.0), ("ax", 0.0))]
    alone = with_ids(row(["abc"], 1.0, [0.5], problem_id="train/4"))
    unscored = with_ids(row(["abc"], None, [0.5], problem_id="train/3"))
    entries = [e["others"] for e in parts_of(responses(*group, unscored, alone), 1)["core"]["responses"]]
    assert entries[3] == entries[4] == {}
    std = (2 / 9 * 3 / 2) ** 0.5  # of 1, 0, 0 with the divisor 2
    for i, (grpo, rloo) in enumerate([(2 / 3, 1.0), (-1 / 3, -0.5), (-1 / 3, -0.5)]):
        assert expanded(entries[i]["GRPO"]) == pytest.approx(
            [grpo / (std + 1e-4)] * len(group[i]["response"]), rel=1e-5
        )
        assert expanded(entries[i]["RLOO"]) == pytest.approx([rloo] * len(group[i]["response"]))
    tree = leave_one_out_tree([r["response_ids"] for r in group], [1.0, 0.0, 0.0], 2.0)
    for entry, of_tokens in zip(entries, tree, strict=False):
        assert expanded(entry["TEMPO"]) == pytest.approx(of_tokens, rel=1e-5)
    # The last token of "abc": its return is 1, its baseline (1 * 0 + 2 * b) / 3, where b = (2 * 0 + 2 * 0) / 4.
    assert expanded(entries[0]["TEMPO"])[2] == pytest.approx(1.0)


def test_every_number_of_a_real_run_survives(vineppo_run: Path) -> None:
    """The values, advantages and texts of the page are those of the read layer, and the sums telescope."""
    found, parts = responses_of(vineppo_run, 2), iteration_data(vineppo_run, 2)
    assert json.loads(gzip.decompress(compressed(parts))) == parts
    for response, entry, tokens in zip(found, parts["core"]["responses"], parts["tokens"]["responses"], strict=True):
        texts = [parts["core"]["texts"][t] for t in entry["t"]]
        assert "".join(texts) == response.text
        assert expanded(entry["a"]) == pytest.approx([t.advantage for t in response.tokens], rel=1e-5, abs=1e-9)
        assert entry["s"]["v"][0] + sum(entry["s"]["a"]) == pytest.approx(response.reward, abs=1e-4)
        assert tokens["lp"] == pytest.approx([1000 * (t.logprob or 0) for t in response.tokens], abs=0.51)
        assert tokens["h"] == pytest.approx([1000 * (t.entropy or 0) for t in response.tokens], abs=0.51)
    for response, entries in zip(found, parts["more"]["responses"], strict=True):
        assert len(entries) == len(response.continuations)
        for c, (state, _, _, _, place, text, reward, _) in zip(response.continuations, entries, strict=True):
            start = response.character(state)
            assert start is not None and response.text[start:place] + text == c.text and reward == c.reward


def test_alternatives_of_a_real_run(counterfactual_run: Path) -> None:
    found, core = responses_of(counterfactual_run, 1), iteration_data(counterfactual_run, 1)["core"]
    alternatives = [a for entry in core["responses"] for a in entry["alt"]]
    assert len(alternatives) == sum(len(r.alternatives) for r in found) > 0
    assert all(advantage < 0 for _, _, advantage in alternatives)


def test_a_file_without_token_texts_has_the_text_of_each_step() -> None:
    [response] = responses(row(["ab\n", "c"], 1.0, [0.5, 0.5], token_ends=[]))
    assert token_texts(response) == ["ab\n", "", "", "c"]
    [response] = responses(row(["ab\n", "c"], 1.0, token_ends=[]))
    assert token_texts(response) == ["ab\nc", "", "", ""]
    [entry] = parts_of([response], 1)["core"]["responses"]
    assert entry["exact"] is False


def test_what_the_page_says_about_a_run(tmp_path: Path) -> None:
    run = run_with(run_with(tmp_path / "run", row(["a"], 1.0)), row(["a"], 0.0), iteration=4)
    (run / "metrics.jsonl").write_text(
        '{"iteration": 1, "reward/mean": 1.0}\n{"iteration": 4, "reward/mean": 0.0, "eval/accuracy": 0.25}\n'
    )
    meta = run_meta(run)
    assert (meta["name"], meta["algorithm"], meta["iterations"]) == ("run", "VinePPO", [1, 4])
    assert meta["curve"] == [[1, 1, None], [4, 0, 0.25]]
    (run / "metrics.jsonl").write_text("no JSON\n")
    assert run_meta(run)["curve"] == []


def test_numbers() -> None:
    assert [rounded(x) for x in (1 / 3, 2.0, -1234567.8, float("nan"), float("inf"), None)] == [
        0.333333, 2, -1234570, None, None, None,
    ]  # fmt: skip
    assert runs_of([1, 1, None, 2]) == [1, 2, None, 1, 2, 1] and runs_of([]) == []
    assert spread_order([1, 2, 3, 4, 5]) == [5, 1, 3, 2, 4] and spread_order([]) == [] and spread_order([7]) == [7]
    assert sorted(spread_order(range(1, 101))) == list(range(1, 101))
    assert ranges([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"


def test_json_cannot_leave_its_element() -> None:
    hostile = "</script><script>alert(1)</script><!--  \u2028 & \ud800"
    text = to_json({"a": hostile})
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text) == {"a": hostile}
