"""Splitters: step boundaries as token indices, defined for every response."""

from __future__ import annotations

import math
import random
import sys
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vineppo.model.codec import Codec
from vineppo.steps import build_splitter, merge_steps
from vineppo.types import UserError

newline = build_splitter("newline")

# Difficult tokens: newlines, answer marks, merged tokens, partial characters, special tokens.
PIECES = ["", " ", "\n", "\r\n", "\t", "a", "b.", ".\n", ".\n\n", "\n\n\n", "####", "##", "\n####", "\n#", "a\nb"]
PIECES += ["a\nb\nc", " \n", "\n  x", "\ufffd", "\u00a0", "\u2028"]
responses = st.lists(st.one_of(st.sampled_from(PIECES), st.text("a#\n ", max_size=4)), min_size=1, max_size=30)


def texts_of(tokens: list[str], boundaries: tuple[int, ...]) -> list[str]:
    return ["".join(tokens[start:end]) for start, end in pairwise((0, *boundaries))]


def lines_of(text: str) -> list[str]:
    """The expected steps: non-blank lines, with answer lines joined to the previous line."""
    lines: list[str] = []
    for line in text.split("\n"):
        if line.strip() and lines and line.strip().startswith("####"):
            lines[-1] += "\n" + line
        elif line.strip():
            lines.append(line)
    return lines


@settings(deadline=None)
@given(responses)
def test_newline_boundaries_strictly_increase_end_at_t_and_leave_no_blank_step(tokens: list[str]) -> None:
    boundaries = newline(tokens)
    assert boundaries[-1] == len(tokens)
    assert all(start < end for start, end in pairwise((0, *boundaries)))
    steps = texts_of(tokens, boundaries)
    assert "".join(steps) == "".join(tokens)
    assert all(step.strip() for step in steps) or len(steps) == 1
    assert not any(step.lstrip().startswith("####") for step in steps[1:])


@settings(deadline=None)
@given(responses)
def test_newline_state_ends_in_white_space_only_if_one_token_has_text_and_white_space(tokens: list[str]) -> None:
    for boundary in newline(tokens)[:-1]:
        last = next(token for token in reversed(tokens[:boundary]) if token)
        assert not last[-1].isspace() or last.strip()


@settings(deadline=None)
@given(st.text("a#. \n\r", min_size=1, max_size=60))
def test_newline_steps_of_single_character_tokens_are_the_lines(text: str) -> None:
    steps = texts_of(list(text), newline(list(text)))
    expected = [line.split() for line in lines_of(text)] or [[]]
    assert [step.split() for step in steps] == expected


@settings(deadline=None)
@given(responses)
def test_newline_moves_each_cut_to_the_first_token_start_at_or_after_it(tokens: list[str]) -> None:
    text = "".join(tokens)
    exact = set(newline(list(text))[:-1]) if text else set()
    starts = list(accumulate(map(len, tokens), initial=0))
    snapped = {next(index for index, start in enumerate(starts) if start >= cut) for cut in exact}
    assert set(newline(tokens)[:-1]) <= snapped


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["a", "=", "1", "\n", "b", "=", "2", ""], (3, 8)),  # the newline belongs to the next step, EOS to the last one
        (["x", ".\n\n", "y", "."], (2, 4)),  # newlines merged with the period stay with it
        (["x", ".\n", "\n", "y"], (2, 4)),  # the rest of the white space belongs to the next step
        (["x", "\n\n\n", "y"], (1, 3)),
        (["x", " ", "\n", " ", "\n", "y"], (1, 6)),  # blank lines, and a space before the newline
        (["x", "\n", "####", " 7", "\n", ""], (6,)),  # the answer line belongs to the previous step
        (["x", "\n", "##", "##", " 7", "\n", "y"], (5, 7)),
        (["#### 7", "\n", "y"], (1, 3)),  # an answer line without a previous step
        (["\n", "\n", "x"], (3,)),
        (["x", "\n", "", "\n"], (4,)),
        (["\n", "", " "], (3,)),  # entirely blank
        (["", ""], (2,)),
        (["a\nb\nc", "\n", "d"], (1, 3)),  # lines inside one token are not separated
        (["a\nb", "\n####", " 7"], (3,)),  # the cut would move to the start of an answer line, so there is none
        (["\ufffd", "\ufffd", "\n", "\ufffd", "\ufffd"], (2, 5)),  # partial characters count as text
        (["x", "\r\n", "y"], (1, 3)),
    ],
)
def test_newline_by_hand(tokens: list[str], ends: tuple[int, ...]) -> None:
    assert newline(tokens) == ends


def test_newline_is_linear_in_a_long_blank_response() -> None:
    tokens = [" "] * 200_000  # a backtracking pattern would take minutes
    assert newline(tokens) == (200_000,)


@settings(deadline=None)
@given(responses, st.integers(1, 40))
def test_every_n_tokens(tokens: list[str], num_tokens: int) -> None:
    boundaries = build_splitter(f"tokens:{num_tokens}")(tokens)
    assert boundaries[-1] == len(tokens)
    assert all(end % num_tokens == 0 for end in boundaries[:-1])
    pieces = texts_of(tokens, boundaries)
    assert all(piece.strip() for piece in pieces[:-1])
    # One piece for each group of N tokens that is not blank, except the last group, and one for the rest.
    groups = [tokens[start : start + num_tokens] for start in range(0, len(tokens), num_tokens)]
    assert len(pieces) == 1 + sum(any(token.strip() for token in group) for group in groups[:-1])


def test_every_n_tokens_by_hand() -> None:
    assert build_splitter("tokens:3")(list("abcdefg")) == (3, 6, 7)
    assert build_splitter("tokens:3")(list("abcdef")) == (3, 6)


@pytest.mark.parametrize("spec", ["newline", "tokens:4"])
def test_a_response_without_tokens_has_no_steps(spec: str) -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        build_splitter(spec)([])


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "newlines",
        "tokens",
        "tokens:",
        "tokens:0",
        "tokens:-1",
        "tokens:x",
        "tokens:²",
        "math:3",
        "cutpoints:",
        "cutpoints:5",
        "cutpoints:0:0.9",
        "cutpoints:5:1.1",
        "regex:",
        ":cut",
        "my_module:",
    ],
)
def test_the_message_for_an_unknown_splitter_lists_the_allowed_ones(spec: str) -> None:
    with pytest.raises(UserError, match=r"allowed: newline, math, tokens:N, .* or module:function, "):
        build_splitter(spec)


CUTS = """
import functools, itertools

def at_a(tokens):
    return [i for i, token in enumerate(tokens, 1) if token == "a" and i < len(tokens)] + [len(tokens)]

def with_default(tokens, every=2):
    return range(every, len(tokens) + 1, every) if len(tokens) % every == 0 else (len(tokens),)

def by_name(tokens, *, logprobs=()):
    return tuple(i for i, p in enumerate(logprobs, 1) if p < -1 or i == len(tokens))

def by_position(tokens, others):
    return by_name(tokens, logprobs=others)

def one_by_one(tokens, logprobs=()):
    yield from range(1, len(tokens) + 1)

halves = functools.partial(with_default, every=2)

def raises(tokens, logprobs=()):
    raise KeyError("first\\nsecond")

def breaks_late(tokens):
    yield 1
    raise OSError("late")

def takes_three(tokens, logprobs, third):
    return [len(tokens)]

def returns(what):
    return lambda tokens, logprobs=(): what

nothing, none, number, text = returns(()), returns(None), returns(3), returns("123")
zero, twice, down = returns([0, 3]), returns([1, 1, 3]), returns([2, 1, 3])
short, long = returns([1, 2]), returns([1, 4])
part, truth, endless = returns([1.0, 3.0]), returns([True, 3]), lambda tokens: itertools.count(1)
constant = 5
"""


@pytest.fixture
def cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_cuts.py").write_text(CUTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_cuts", raising=False)
    return "my_cuts"


def test_user_defined_splitters_get_tokens_and_optionally_logprobs(cuts: str) -> None:
    tokens, logprobs = list("bacada"), [-2.0, -0.5, -2.0, -0.5, -0.5, -0.5]
    expected = {
        "at_a": (2, 4, 6),
        "with_default": (2, 4, 6),
        "halves": (2, 4, 6),
        "by_name": (1, 3, 6),
        "by_position": (1, 3, 6),
        "one_by_one": (1, 2, 3, 4, 5, 6),
    }
    for name, ends in expected.items():
        split = build_splitter(f"{cuts}:{name}")
        assert split(tokens, logprobs) == split(tuple(tokens), tuple(logprobs)) == ends, name
    assert build_splitter(f"{cuts}:at_a")(["a"]) == (1,)
    with pytest.raises(ValueError, match="0 tokens"):
        build_splitter(f"{cuts}:at_a")([])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("nothing", "[]"),
        ("none", "None"),
        ("number", "3"),
        ("text", "['1', '2', '3']"),
        ("zero", "[0, 3]"),
        ("twice", "[1, 1, 3]"),
        ("down", "[2, 1, 3]"),
        ("short", "[1, 2]"),
        ("long", "[1, 4]"),
        ("part", "[1.0, 3.0]"),
        ("truth", "[True, 3]"),
        ("endless", "[1, 2, 3, 4]"),
    ],
)
def test_the_result_of_a_user_defined_splitter_is_checked(cuts: str, name: str, shown: str) -> None:
    with pytest.raises(UserError) as refused:
        build_splitter(f"{cuts}:{name}")(["x", "y", "z"])
    assert str(refused.value) == (
        f"splitter 'my_cuts:{name}' returned {shown} for a response of 3 tokens; it must return the end of each "
        "step as integers from 1 to 3, strictly increasing, the last one 3"
    )


def test_a_long_wrong_result_is_shortened_in_the_message(cuts: str) -> None:
    with pytest.raises(UserError) as refused:
        build_splitter(f"{cuts}:endless")(["x"] * 1000)
    assert "returned [1, 2, 3, 4, 5, ..., 1001] for a" in str(refused.value)


def test_failures_of_user_defined_splitters_raise_one_line_messages(cuts: str) -> None:
    refusals = {
        "raises": "failed: KeyError: 'first",
        "breaks_late": "failed: OSError: late; it is called as cut(tokens, logprobs=())",
        "takes_three": "has the parameters (tokens, logprobs, third); allowed: (tokens, logprobs=()) or (tokens)",
        "constant": "is a int; it must be a function",
        "at_b": "has no 'at_b'; did you mean 'at_a'?",
    }
    for name, message in refusals.items():
        with pytest.raises(UserError) as refused:
            build_splitter(f"{cuts}:{name}")(["x", "y"])
        assert message in str(refused.value) and "\n" not in str(refused.value)
        assert str(refused.value).startswith(f"splitter 'my_cuts:{name}'")


@settings(deadline=None)
@given(st.sets(st.integers(1, 200), min_size=1), st.integers(0, 40))
def test_merged_steps_are_even_and_keep_the_end(ends: set[int], max_states: int) -> None:
    boundaries = tuple(sorted(ends))
    merged = merge_steps(boundaries, max_states)
    assert len(merged) == (min(max_states, len(boundaries)) or len(boundaries))
    assert merged[-1] == boundaries[-1]
    positions = [-1, *(boundaries.index(end) for end in merged)]
    sizes = [after - before for before, after in pairwise(positions)]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_merged_steps_by_hand() -> None:
    boundaries = (2, 5, 9, 10, 14)
    assert merge_steps(boundaries, 0) == boundaries
    assert merge_steps(boundaries, 5) == boundaries
    assert merge_steps(boundaries, 2) == (5, 14)
    assert merge_steps(boundaries, 1) == (14,)
    with pytest.raises(ValueError, match="0 steps"):
        merge_steps((), 3)
    with pytest.raises(ValueError, match="at most -1"):
        merge_steps(boundaries, -1)


# ---- all splitters with tokens of real tokenizers, for ordinary and malformed text

SPECS = ["newline", "math", "tokens:3", "cutpoints", "cutpoints:2:0.5", r"regex:\\n|[.]\s"]
TEXT = (
    "First, we expand: $(x+1)^2 = x^2 + 2x + 1$. Then e.g. Mr. Euler says $x = 3.5$ is fine. So we get\n"
    "\\begin{align*}\nx &= \\frac{a = b}{2} \\\\\n&= 7. And so\n\\end{align*}\n\n  The answer is $\\boxed{7}$.\n#### 7"
)
FRAGMENTS = [
    "$",
    "$$",
    "\\(",
    "\\)",
    "\\[",
    "\\begin{align}",
    "\\end{align}",
    "\\frac{",
    "}",
    "{",
    " = ",
    ", ",
    " and ",
    ". ",
    "A",
]
FRAGMENTS += ["1", "\n", "\n\n", "#### 7", " ", "x" * 60, "é", "漢字", "🙂", "\u00a0", "\\", "? ", '." ', "e.g. "]
mathematics = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=40).map("".join)


@cache
def tokenizers_of_three_kinds() -> dict[str, Tokenizer]:
    """Byte-level BPE, Unigram with SentencePiece's spaces, and character tokenizers, trained on a few lines."""
    corpus = [TEXT, *(f"Step {n}: {n} + {n} = {2 * n}, and the {n}th term is 漢字 é." for n in range(60))]
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer, byte_level.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces.train_from_iterator(
        corpus, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"])
    )
    characters = Tokenizer(models.BPE())
    characters.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=1, show_progress=False))
    return {"byte-level": byte_level, "unigram": pieces, "characters": characters}


def tokens_of(kind: str, text: str) -> list[str]:
    """Texts of the single tokens, and of an end-of-sequence token; partial characters become U+FFFD."""
    tokenizer = tokenizers_of_three_kinds()[kind]
    return [*(tokenizer.decode([token]) for token in tokenizer.encode(text).ids), ""]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["byte-level", "unigram", "characters"])
@settings(deadline=None, max_examples=60)
@given(text=st.one_of(mathematics, st.text(max_size=80), st.just(TEXT)), seed=st.integers(0, 99))
def test_every_splitter_works_with_every_tokenizer(kind: str, spec: str, text: str, seed: int) -> None:
    tokens = tokens_of(kind, text)
    logprobs = [math.log(random.Random(f"{seed} {i}").uniform(0.05, 1)) for i in range(len(tokens))]
    split = build_splitter(spec)
    boundaries = split(tokens, logprobs)
    assert boundaries[-1] == len(tokens)
    assert all(start < end for start, end in pairwise((0, *boundaries)))
    assert "".join(texts_of(tokens, boundaries)) == "".join(tokens)
    assert split(tokens, logprobs) == boundaries
    if not spec.startswith("tokens:"):
        assert all(step.strip() for step in texts_of(tokens, boundaries)) or len(boundaries) == 1


def steps_of(spec: str, text: str) -> list[str]:
    return texts_of(list(text), build_splitter(spec)(list(text)))


def test_math_splits_at_sentences_and_lines_but_not_inside_formulas() -> None:
    assert steps_of("math", TEXT) == [
        "First, we expand: $(x+1)^2 = x^2 + 2x + 1$.",
        " Then e.g. Mr. Euler says $x = 3.5$ is fine.",
        " So we get",
        "\n\\begin{align*}",
        "\nx &= \\frac{a = b}{2} \\\\",
        "\n&= 7. And so",
        "\n\\end{align*}",
        "\n\n  The answer is $\\boxed{7}$.\n#### 7",
    ]


def test_math_bisects_long_pieces_near_their_middle() -> None:
    long = "the first of the summands is a, the second of the summands is b, the third one is c and the fourth is d"
    assert steps_of("math", long) == [
        "the first of the summands is a, the second of the summands is b,",
        " the third one is c and the fourth is d",
    ]
    assert steps_of("math", long[:100]) == [long[:100]]
    chain = "$" + " = ".join(f"\\frac{{{n} = n}}{{{'9' * 20}}}" for n in range(4)) + "$"
    pieces = steps_of("math", chain)
    assert len(pieces) == 2 and pieces[1].startswith(" = \\frac{2")  # never inside the braces
    protected = "$(" + "a, " * 60 + "b)$"
    assert steps_of("math", protected) == [protected]


@pytest.mark.parametrize("text", ["a $ b. C", "a \\[ b. C", "a \\begin{align} b. C", "a \\begin{x} b. C \\end{y}"])
def test_math_treats_an_unclosed_formula_as_text(text: str) -> None:
    assert steps_of("math", text)[0].endswith("b.")


def test_cutpoints_end_after_every_nth_uncertain_token_and_never_look_ahead() -> None:
    tokens = ["a", " b", " ", "c", "d", "e", "f", "g", ""]
    sure, unsure = math.log(0.95), math.log(0.4)
    logprobs = [unsure, sure, unsure, unsure, sure, unsure, unsure, unsure, unsure]
    split = build_splitter("cutpoints:2:0.5")
    assert split(tokens, logprobs) == (3, 6, 9)  # the last two uncertain tokens belong to the last step
    for end in range(4, 9):
        assert split(tokens[:end], logprobs[:end])[:-1] == tuple(b for b in split(tokens, logprobs)[:-1] if b < end)
    assert build_splitter("cutpoints")(tokens, logprobs) == (7, 9)
    with pytest.raises(ValueError, match="9 tokens but 0 log-probabilities"):
        split(tokens)


def test_regex_splits_after_matches() -> None:
    assert steps_of("regex:;", "a; b;; c;") == ["a;", " b;", ";", " c;"]
    assert steps_of("regex:(?=Step)", "Step 1 x\nStep 2 y") == ["Step 1 x\n", "Step 2 y"]
    with pytest.raises(UserError, match=r"'\(' is not a valid regular expression \(missing"):
        build_splitter("regex:(")


def test_every_n_tokens_merges_white_space_into_the_next_step() -> None:
    assert build_splitter("tokens:1")(["a", " ", "b", ""]) == (
        1,
        3,
        4,
    )  # EOS is a separate step
    assert build_splitter("tokens:2")([" ", "\n", "a", "b", "c"]) == (4, 5)


def test_splitting_long_white_space_takes_linear_time() -> None:
    """A search that restarts at each space would take minutes here."""
    tokens = ["x", *[" "] * 100_000, "y"]
    for spec in ("math", "newline"):
        assert build_splitter(spec)(tokens)[-1] == len(tokens)


def test_token_texts_of_a_llama_tokenizer_keep_their_spaces() -> None:
    """Decoding a single token would drop its leading space; the steps are those of a byte-level tokenizer."""
    words = ["▁It", "▁is", "▁5", ".", "▁Then", "▁x", "▁is", "▁6", "."]
    vocabulary = {"</s>": 0, **{word: n for n, word in enumerate(dict.fromkeys(words), 1)}}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", clean_up_tokenization_spaces=False)
    texts = Codec(tokenizer, eos_ids=(0,)).token_texts([*(vocabulary[word] for word in words), 0])
    assert texts == [word.replace("▁", " ") for word in words] + [""]
    assert build_splitter("math")(texts) == (4, 10)
