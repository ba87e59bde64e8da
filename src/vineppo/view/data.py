"""Convert the saved responses of a run to compact JSON for the credit viewer (`vineppo view`).

The data of an iteration have four parts, which a page reads only when it needs them:

- `rows`: one entry per response in columns, for lists, filters and queues;
- `core`: prompts, texts, steps with their values and advantages, advantages of tokens, alternatives, other credits;
- `tokens`: log-probability, entropy, weight and predicted value of each token;
- `more`: the continuations from which the credit was computed.

Numbers are rounded: values, rewards and advantages to 6 significant digits, intervals, weights and predicted values to
4, log-probabilities and entropies to 0.001 nats. Token texts are indices into a table of the iteration. Shapes use the
letters of `records.py`.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vineppo.credit import find_algorithm
from vineppo.credit.advantages import grpo_advantages, leave_one_out_advantages
from vineppo.credit.algorithm import Algorithm
from vineppo.credit.grpo import GRPO
from vineppo.credit.rloo import RLOO
from vineppo.credit.tempo import TEMPO, TempoSettings, leave_one_out_tree
from vineppo.run.directory import RunDirectory
from vineppo.types import UserError
from vineppo.view.foreign import is_foreign, lacks_text
from vineppo.view.queues import QUEUES, Entry
from vineppo.view.records import algorithm_of, consecutive, iterations_of, responses_of
from vineppo.view.response import Response, Step

PARTS = ("rows", "core", "tokens", "more")
"""Names of the parts of an iteration."""
PREVIEW = 90
"""Number of characters of a prompt in the rows."""
_GROUP_CREDITS: tuple[Algorithm, ...] = (GRPO, RLOO, TEMPO)
"""Algorithms whose credit follows from the rewards and the tokens of a group alone."""

Json = dict[str, Any]


def run_meta(run: str | Path) -> Json:
    """Return what the page says about a run as a whole.

    Returns:
        The keys `name` (of the directory or file), `recipe`, `algorithm` (its label, or the format of another trainer's
        file), `iterations` (numbers of the saved ones) and `curve` (mean reward and accuracy of each iteration in
        metrics.jsonl).
    Raises:
        UserError: if `run` is neither a run directory nor such a file, or no responses are saved.
    """
    iterations = iterations_of(run)
    if is_foreign(run):
        name = Path(run).resolve().name
        return {"name": name, "recipe": "", "algorithm": algorithm_of(run), "iterations": iterations, "curve": []}
    directory = RunDirectory.open(run, writable=False)
    return {
        "name": directory.path.resolve().name,
        "recipe": str(directory.read_record().get("recipe", "")),
        "algorithm": _label(str(directory.config.get("algorithm", ""))),
        "iterations": iterations,
        "curve": _curve(directory),
    }


def _label(name: str) -> str:
    """Return the label of an algorithm; for one that cannot be imported here, its name."""
    try:
        return find_algorithm(name).label
    except UserError:
        return name


def _curve(directory: RunDirectory) -> list[list[Any]]:
    """Return [iteration, mean reward, accuracy] of each iteration; None for an unknown number."""
    try:
        lines = directory.read_metrics()
    except UserError:  # a damaged file must not hide the responses
        return []
    return [[line["iteration"], rounded(line.get("reward/mean")), rounded(line.get("eval/accuracy"))] for line in lines]


def iteration_data(run: str | Path, iteration: int, tokenizer: str | Path | None = None) -> dict[str, Json]:
    """Return the parts of an iteration: the name of each part (`PARTS`) -> its data.

    Args:
        run: a run directory, or another trainer's file.
        iteration: number of the iteration.
        tokenizer: see `records.responses_of`; not used for a run that has texts.
    Raises:
        UserError: if the run has no such iteration, or its file cannot be read.
    """
    return parts_of(responses_of(run, iteration, tokenizer if lacks_text(run) else None), iteration)


def parts_of(responses: Sequence[Response], iteration: int) -> dict[str, Json]:
    """Return the parts of an iteration from its responses. See the module for what each part contains."""
    table = _Table()
    problems: dict[tuple[str, str], int] = {}
    for response in responses:
        problems.setdefault((response.problem_id, response.prompt), len(problems))
    answers = {(r.problem_id, r.prompt): r.answer for r in responses}
    others = _group_credits(responses)
    core = [
        _core(response, problems[response.problem_id, response.prompt], table, credits)
        for response, credits in zip(responses, others, strict=True)
    ]
    return {
        "rows": _rows(responses, iteration),
        "core": {
            "problems": [[problem, prompt, answers[problem, prompt]] for problem, prompt in problems],
            "texts": table.texts,
            "responses": core,
        },
        "tokens": {"responses": [_tokens(response) for response in responses]},
        "more": {"responses": [_continuations(response) for response in responses]},
    }


class _Table:
    """The distinct tokens of an iteration, by id and text. Tokens with equal texts can have different ids."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._indices: dict[tuple[int, str], int] = {}

    def index(self, token: int, text: str) -> int:
        """Return the index of a token, which is added if it is new."""
        key = (token, text)
        if key not in self._indices:
            self._indices[key] = len(self.texts)
            self.texts.append(text)
        return self._indices[key]


def _rows(responses: Sequence[Response], iteration: int) -> Json:
    """Return the part `rows`: columns with one entry per response, and the entries of the queues."""
    lowest = [min((s.advantage for s in r.steps if s.advantage is not None), default=None) for r in responses]
    preview = [" ".join(r.prompt.split())[:PREVIEW] for r in responses]
    return {
        "iteration": iteration,
        "count": len(responses),
        "kind": [r.kind for r in responses] if any(r.kind != "rollout" for r in responses) else [],
        "problem": [r.problem_id for r in responses],
        # Neighbours with the same prompt have it once.
        "preview": [text if i == 0 or text != preview[i - 1] else None for i, text in enumerate(preview)],
        "reward": [rounded(r.reward) for r in responses],
        "finish": [r.finish_reason for r in responses],
        "tokens": [r.num_tokens or 0 for r in responses],  # 0: the file has no tokens
        "steps": [len(r.steps) for r in responses],
        "lowest": [rounded(number, 3) for number in lowest],
        "continuations": [len(r.continuations) for r in responses],
        "queues": _queues(responses),
    }


def _queues(responses: Sequence[Response]) -> Json:
    """Return the entries of each queue as [index of the response, number of the step, reason, sort key]."""
    found = {}
    for name, entries_of in QUEUES.items():
        try:
            entries = entries_of(responses)
        except UserError:  # no response has what the queue needs
            entries = []
        index = {id(response): i for i, response in enumerate(responses)}
        found[name] = [
            [index[id(e.response)], e.step.number if e.step else None, e.reason, rounded(_key(name, e), 4)]
            for e in entries
        ]
    return found


def _key(name: str, entry: Entry) -> float:
    """Return the number by which a page sorts the entries of a queue of several iterations, the smallest first."""
    response, step = entry.response, entry.step
    if step is None:
        return 0.0
    if name == "lucky":
        return response.value_after(step) or 0.0
    if name == "disagree":
        return -abs(response.value_change(step) or 0.0)
    return step.advantage or 0.0


def _core(response: Response, problem: int, table: _Table, credits: Json) -> Json:
    """Return the entry of a response in the part `core`. `t` has the index of each token in the table, shape (T,)."""
    advantages = [rounded(token.advantage) for token in response.tokens]
    return {
        "p": problem,
        "t": [table.index(token.id, text) for token, text in zip(response.tokens, token_texts(response), strict=True)],
        "exact": all(token.text is not None for token in response.tokens),
        "a": runs_of(advantages),
        "credit": response.credit,
        "s": _steps(response.steps),
        "alt": [
            [a.position, table.index(a.id, a.text), rounded(a.advantage)]
            for a in sorted(response.alternatives, key=lambda a: a.position)
        ],
        "others": credits,
    }


def token_texts(response: Response) -> list[str]:
    """Return the text of each token. If the texts are unknown, the first token of a step gets the text of the step.

    The texts, joined, are the text of the response.
    """
    known = [token.text for token in response.tokens if token.text is not None]
    if len(known) == len(response.tokens):
        return known
    texts = [""] * len(response.tokens)
    for step in response.steps:
        texts[step.start] = step.text
    return texts if "".join(texts) == response.text else [response.text, *([""] * (len(texts) - 1))]


def _steps(steps: Sequence[Step]) -> Json:
    """Return the columns of the steps, shape (S,) each; a column without any number is left out."""
    columns: dict[str, list[Any]] = {
        "end": [step.end for step in steps],
        "v": [rounded(step.value) for step in steps],
        "k": [step.num_mc_rollouts for step in steps],
        "lo": [None if step.interval is None else rounded(step.interval.low, 4) for step in steps],
        "hi": [None if step.interval is None else rounded(step.interval.high, 4) for step in steps],
        "a": [rounded(step.advantage) for step in steps],
        "sum": [rounded(step.token_sum) for step in steps],
    }
    return {name: column for name, column in columns.items() if any(number is not None for number in column)}


def _tokens(response: Response) -> Json:
    """Return the entry of a response in the part `tokens`. Log-probabilities and entropies are in 0.001 nats."""
    tokens = response.tokens
    columns: Json = {
        "lp": [_thousandths(token.logprob) for token in tokens],
        "h": [_thousandths(token.entropy) for token in tokens],
        "v": [rounded(token.value, 4) for token in tokens],
    }
    found = {name: column for name, column in columns.items() if any(number is not None for number in column)}
    if any(token.weight != 1 for token in tokens):
        found["w"] = runs_of([rounded(token.weight, 4) for token in tokens])
    return found


def _continuations(response: Response) -> list[list[Any]]:
    """Return [state, shared, accepted, number of tokens, character, text, reward, finish reason] per continuation.

    The text is only what comes after the shared tokens. `character` is its place in the text of the response, or None
    if the place is unknown; the text is then the whole continuation.
    """
    known = all(token.text is not None for token in response.tokens)
    places = [0, *itertools.accumulate(len(token.text or "") for token in response.tokens)] if known else []
    found = []
    for c in response.continuations:
        text, place = c.text, None
        if c.state + c.shared < len(places):
            start, leaves = places[c.state], places[c.state + c.shared]
            if c.text.startswith(response.text[start:leaves]):
                text, place = c.text[leaves - start :], leaves
        found.append([c.state, c.shared, c.accepted, c.num_tokens, place, text, rounded(c.reward), c.finish_reason])
    return found


def _group_credits(responses: Sequence[Response]) -> list[Json]:
    """Return the credit that other algorithms give to each response: label -> runs of token advantages.

    Only algorithms that need nothing but the rewards and tokens of a group are computed, with their default settings.
    The result is empty for a response without a reward or without others to the same problem.
    """
    found: list[Json] = [{} for _ in responses]
    members = [i for i, r in enumerate(responses) if r.kind == "rollout" and r.reward is not None]
    for _, group in itertools.groupby(members, key=lambda i: (responses[i].problem_id, responses[i].prompt)):
        indices = list(group)
        if len(indices) < 2:
            continue
        rewards = [responses[i].reward or 0.0 for i in indices]
        ids = [[token.id for token in responses[i].tokens] for i in indices]
        whole = (grpo_advantages(rewards, True), leave_one_out_advantages(rewards))
        tree = leave_one_out_tree(ids, rewards, TempoSettings().prior)
        for n, i in enumerate(indices):
            per_token = [[row[n]] * len(ids[n]) for row in whole] + [tree[n]]
            found[i] = {
                algorithm.label: runs_of([rounded(number) for number in numbers])
                for algorithm, numbers in zip(_GROUP_CREDITS, per_token, strict=True)
            }
    return found


def runs_of(numbers: Sequence[float | None]) -> list[Any]:
    """Return numbers as [value, count, value, count, ...], one pair per run of equal numbers."""
    return [item for value, run in itertools.groupby(numbers) for item in (value, sum(1 for _ in run))]


def rounded(number: float | None, digits: int = 6) -> float | int | None:
    """Return a number with so many significant digits, as an int if it is whole; None for None, NaN and infinity."""
    if number is None or not math.isfinite(number):
        return None
    short = float(f"{number:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _thousandths(number: float | None) -> int | None:
    """Return a number in units of 0.001; None for None, NaN and infinity."""
    return None if number is None or not math.isfinite(number) else round(1000 * number)


def to_json(data: Any) -> str:
    r"""Return data as JSON in ASCII that can stand inside an element `script` of HTML.

    `<`, `>`, `&` and all characters that are not ASCII, such as U+2028, are escaped as `\uXXXX`.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def compressed(data: Any) -> bytes:
    """Return data as JSON, compressed with gzip. Equal data give equal bytes."""
    return gzip.compress(json.dumps(data, separators=(",", ":"), allow_nan=False).encode(), mtime=0)


def spread_order(numbers: Sequence[int]) -> list[int]:
    """Return ascending numbers in an order whose every beginning is spread over the whole: ends first, then middles.

    For example, 1 to 5 become 5, 1, 3, 2, 4. A page that has room for n iterations in full takes the first n.
    """
    order, seen = [], set[int]()
    gaps = [(0, len(numbers) - 1)] if numbers else []
    for index in (len(numbers) - 1, 0) if numbers else ():
        if index not in seen:
            seen.add(index)
            order.append(index)
    while gaps:
        following = []
        for low, high in gaps:
            middle = (low + high) // 2
            if high - low < 2:
                continue
            if middle not in seen:
                seen.add(middle)
                order.append(middle)
            following += [(low, middle), (middle, high)]
        gaps = following
    return [numbers[index] for index in order]


def ranges(numbers: Sequence[int]) -> str:
    """Return numbers as a short text such as `1-20, 25`."""
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in consecutive(numbers))
