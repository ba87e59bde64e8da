"""Write problems of the data set chain_sum as tables, for machines without reasoning-gym.

    python experiments/smollm2/tables.py runs/sums

The directory gets train.jsonl, validation.jsonl and test.jsonl with the columns `prompt`, `answer` and `solution`. The
recipes `sft-sums.yaml` and `sums.yaml` read them. No problem is in two tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import reasoning_gym
from experiments.smollm2.demonstrations import chain_sum

SIZES = {"train": 16_384, "validation": 512, "test": 1_024}
OPTIONS = {"min_terms": 6, "max_terms": 7, "min_digits": 1, "max_digits": 1}
"""The options of `chain_sum.yaml`."""


def rows(count: int) -> list[dict[str, str]]:
    """Return `count` different problems with their answers and solutions."""
    found: dict[str, dict[str, str]] = {}
    for entry in reasoning_gym.create_dataset("chain_sum", size=4 * count, seed=7, **OPTIONS):
        solution = chain_sum(entry, entry["answer"])
        found.setdefault(
            entry["question"],
            {"prompt": entry["question"], "answer": f"#### {entry['answer']}", "solution": solution},
        )
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"the data set has only {len(found)} different problems, {count} are needed")


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    remaining = rows(sum(SIZES.values()))
    for split, size in SIZES.items():
        table, remaining = remaining[:size], remaining[size:]
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        print(f"{out / split}.jsonl: {size} problems")


if __name__ == "__main__":
    main()
