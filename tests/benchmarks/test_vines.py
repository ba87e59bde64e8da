"""The choice of dtypes and the summary of benchmarks/vines.py."""

from __future__ import annotations

import pytest
from benchmarks.vines import ENGINES, best_dtype, markdown, parse_dtypes, part_of, summary


def test_dtypes_are_auto_or_one_for_all_or_one_per_engine() -> None:
    assert parse_dtypes("auto") == {}
    assert parse_dtypes("float32") == dict.fromkeys(ENGINES, "float32")
    assert parse_dtypes("engine=bfloat16,llama_cpp=float16") == {"engine": "bfloat16", "llama_cpp": "float16"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8", "'int8'; allowed: auto"),
        ("engine=fast", "'fast'; allowed: auto"),
        ("engin=float32", "'engin'; allowed: engine, torch"),
        ("engine=float32,auto", "'auto'; allowed: engine, torch"),
    ],
)
def test_wrong_dtypes_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_dtypes(text)


def test_a_16_bit_dtype_must_be_clearly_faster() -> None:
    assert best_dtype({"float32": 10.0, "bfloat16": 9.1}) == "float32"
    assert best_dtype({"float32": 10.0, "bfloat16": 8.9}) == "bfloat16"
    assert best_dtype({"float32": 10.0, "bfloat16": 8.9, "float16": 8.8}) == "float16"
    assert best_dtype({"float16": 3.0, "bfloat16": 2.0}) == "bfloat16"


@pytest.mark.parametrize(("states", "kept"), [(1, 1), (15, 15), (16, 8), (31, 11), (32, 8), (214, 54)])
def test_dtypes_are_compared_on_a_quarter_of_the_states(states: int, kept: int) -> None:
    work = {"model": "m", "prefixes": [[i] for i in range(states)], "lengths": [[i, i + 1] for i in range(states)]}
    part = part_of(work)
    assert len(part["prefixes"]) == len(part["lengths"]) == kept
    assert all(lengths == [prefix[0], prefix[0] + 1] for prefix, lengths in zip(part["prefixes"], part["lengths"]))


def test_ratios_are_relative_to_the_compiled_engine() -> None:
    runs = {
        "engine": [{"seconds": s, "bytes": b} for s, b in ((2.0, 5), (4.0, 7), (3.0, 6))],
        "llama_cpp": [{"seconds": 6.0, "bytes": 1}, {"seconds": 9.0, "bytes": 1}, {"seconds": 60.0, "bytes": 1}],
        "matmul": [{"seconds": 1.5, "bytes": 1}],
    }
    dtypes = {"engine": "bfloat16", "llama_cpp": "float16", "matmul": "bfloat16"}
    result = summary(runs, 600, dtypes)
    assert result["ratio_vs"] == {"llama_cpp": 3.0}
    assert result["matmul_share"] == 0.5
    assert result["engines"]["engine"] == {
        "dtype": "bfloat16",
        "seconds": 3.0,
        "lowest": 2.0,
        "highest": 4.0,
        "tokens_per_second": 200.0,
        "peak_memory_bytes": 7,
    }
    model = {"problems": 1, "group_size": 2, "states": 3, "tokens": 600, "refused": {"vllm": "no"}, **result}
    shown = {"command": "c", "platform": "p", "threads": 2, "torch": "t", "repeats": 3, "k": 9, "models": {"m": model}}
    text = markdown(shown)
    assert "| `llama_cpp` | float16 | 9.00 (6.00 to 60.00) | 67 | 0.00 GiB | 3.00 |" in text
    # Every row has as many cells as the header.
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {7}
