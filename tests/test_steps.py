"""Splitters: step boundaries as token indices, defined for every response and independent of later tokens."""

from __future__ import annotations

import math
import random
import re
import sys
import warnings
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
    """The expected steps: each line with its newline and with the blank lines before it, and the blank rest."""
    return re.findall(r"\s*\S[^\n]*(?:\n|\Z)|\s+\Z", text)


@settings(deadline=None)
@given(responses)
def test_newline_boundaries_strictly_increase_end_at_t_and_leave_no_blank_step(tokens: list[str]) -> None:
    boundaries = newline(tokens)
    assert boundaries[-1] == len(tokens)
    assert all(start < end for start, end in pairwise((0, *boundaries)))
    steps = texts_of(tokens, boundaries)
    assert "".join(steps) == "".join(tokens)
    assert all(step.strip() for step in steps[:-1])


@settings(deadline=None)
@given(responses)
def test_a_line_ends_with_the_token_of_its_newline(tokens: list[str]) -> None:
    for start, end in pairwise((0, *newline(tokens))):
        visible = next((i for i in range(start, end) if tokens[i].strip()), end)
        newlines = [i for i in range(start, end) if "\n" in tokens[i] and "".join(tokens[visible : i + 1]).strip()]
        if end < len(tokens):
            assert newlines[-1] == end - 1
        # A newline in the first visible token may stand before the visible text.
        assert set(newlines) <= {visible, end - 1}


@settings(deadline=None)
@given(st.text("a#. \n\r", min_size=1, max_size=60))
def test_newline_steps_of_single_character_tokens_are_the_lines(text: str) -> None:
    assert texts_of(list(text), newline(list(text))) == lines_of(text)


@settings(deadline=None)
@given(responses)
def test_newline_moves_each_cut_to_the_first_token_start_at_or_after_it(tokens: list[str]) -> None:
    text = "".join(tokens)
    exact = set(newline([*text, ""])[:-1])
    starts = list(accumulate(map(len, tokens), initial=0))
    snapped = {next(index for index, start in enumerate(starts) if start >= cut) for cut in exact}
    assert set(newline(tokens)[:-1]) <= snapped


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["a", "=", "1", "\n", "b", "=", "2", ""], (4, 8)),  # the newline belongs to its line; EOS to the last step
        (["x", ".\n\n", "y", "."], (2, 4)),
        (["x", ".\n", "\n", "y"], (2, 4)),  # a blank line belongs to the next step
        (["x", "\n\n\n", "y"], (2, 3)),
        (["x", " ", "\n", " ", "\n", "y"], (3, 6)),
        (["x", "\n", "####", " 7", "\n", ""], (2, 5, 6)),  # EOS after a newline is a step
        (["x", "\n", "##", "##", " 7", "\n", "y"], (2, 6, 7)),
        (["#### 7", "\n", "y"], (2, 3)),
        (["\n", "\n", "x"], (3,)),
        (["x", "\n", "", "\n"], (2, 4)),
        (["\n", "", " "], (3,)),  # entirely blank
        (["", ""], (2,)),
        (["x", "\n"], (2,)),
        (["a\nb\nc", "\n", "d"], (1, 3)),  # lines inside one token are not separated
        (["a\nb", "\n####", " 7"], (1, 3)),  # a cut inside a token moves to its end
        (["\ufffd", "\ufffd", "\n", "\ufffd", "\ufffd"], (3, 5)),  # partial characters count as text
        (["x", "\r\n", "y"], (2, 3)),
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
    return [*range(every, len(tokens), every), len(tokens)]

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

def before_newlines(tokens):
    return [*(i for i in range(1, len(tokens)) if tokens[i] == "\\n"), len(tokens)]

def in_halves(tokens):
    return sorted({max(1, len(tokens) // 2), len(tokens)})

def not_before_eos(tokens, logprobs):
    return [i for i in range(1, len(tokens)) if tokens[i]] + [len(tokens)]
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


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("before_newlines", (2, "[]", "1", "[2]", "\n")),
        ("in_halves", (2, "[]", "1", "[1]", "")),
        ("not_before_eos", (1, "[1]", "=", "[]", "")),
    ],
)
def test_a_user_defined_splitter_that_looks_ahead_gives_one_warning(
    cuts: str, name: str, difference: tuple[int, str, str, str, str]
) -> None:
    """Case 24."""
    split = build_splitter(f"{cuts}:{name}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            split(["x", "=", "1", "\n", "y", "=", "2", ""], [-0.5] * 8)
    place, ends, token, other_ends, other = difference
    message = (
        f"splitter 'my_cuts:{name}' decides cuts by later tokens, which biases the credit: up to token {place} of a "
        f"response, the ends are {ends} if the next token is {token!r}, and {other_ends} if the response ends with "
        f"{other!r} there; decide whether a step ends at b by tokens[:b] and logprobs[:b] only"
    )
    assert [str(warning.message) for warning in caught] == [message]


@pytest.mark.parametrize("name", ["at_a", "with_default", "by_name", "by_position", "one_by_one", "halves"])
def test_a_user_defined_splitter_that_does_not_look_ahead_gives_no_warning(cuts: str, name: str) -> None:
    split = build_splitter(f"{cuts}:{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in range(1, 9):
            assert (
                split(list("bacadaab")[:length], [-2.0, -0.5, -2.0, -0.5, -2.0, -0.5, -2.0, -0.5][:length])[-1]
                == length
            )


@settings(deadline=None)
@given(st.sets(st.integers(1, 200), min_size=1), st.integers(0, 40), st.integers(1, 200))
def test_merged_steps_are_few_and_do_not_depend_on_later_steps(ends: set[int], max_states: int, length: int) -> None:
    boundaries = tuple(sorted(ends))
    merged = merge_steps(boundaries, max_states)
    assert set(merged) <= ends and merged[-1] == boundaries[-1]
    assert len(merged) <= (max_states or len(ends))
    shorter = merge_steps(boundaries[:length], max_states)
    assert shorter[:-1] == tuple(end for end in merged if end < shorter[-1])


def test_merged_steps_by_hand() -> None:
    boundaries = (2, 5, 9, 10, 14)
    assert merge_steps(boundaries, 0) == boundaries
    assert merge_steps(boundaries, 5) == (2, 5, 10, 14)
    assert merge_steps(boundaries, 4) == (2, 5, 10, 14)
    assert merge_steps(boundaries, 3) == (2, 9, 14)
    assert merge_steps(boundaries, 2) == (2, 14)
    assert merge_steps(boundaries, 1) == (14,)
    assert merge_steps(range(1, 101), 8) == (1, 2, 3, 4, 6, 8, 12, 100)
    assert merge_steps(range(1, 13), 25) == tuple(range(1, 13))
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


@pytest.mark.parametrize("spec", [*SPECS, "tokens:1", "cutpoints:1:0.9", "regex:.", r"regex:a(?=b)|x$|\bA|\n(?!\n)"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_cuts_do_not_depend_on_later_tokens(spec: str, data: st.DataObject) -> None:
    """Responses with equal first n tokens have equal ends up to n, whatever follows and however long it is. Case 24.

    The end n is included: a cut that the next token decides would differ between the continuations.
    """
    pieces = st.sampled_from([*PIECES, *FRAGMENTS, *"$\\{}[](). ,=!aAbx1\n"])
    beginning = data.draw(st.lists(pieces, min_size=1, max_size=30))
    if data.draw(st.booleans()):
        beginning = list("".join(beginning)) or ["a"]
    logprob = st.sampled_from([-1.0, 0.0])
    n, ends = len(beginning), []
    logprobs = data.draw(st.lists(logprob, min_size=n, max_size=n))
    for more in [[""], ["\n"], ["#### 7", ""], data.draw(st.lists(pieces, min_size=1, max_size=6))]:
        later = data.draw(st.lists(logprob, min_size=len(more), max_size=len(more)))
        ends.append([end for end in build_splitter(spec)(beginning + more, logprobs + later) if end <= n])
    assert ends == [ends[0]] * 4


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
    assert all(step.strip() for step in texts_of(tokens, boundaries)[:-1])


def steps_of(spec: str, text: str) -> list[str]:
    return texts_of(list(text), build_splitter(spec)(list(text)))


def test_math_splits_at_sentences_and_lines_but_not_inside_formulas() -> None:
    assert steps_of("math", TEXT) == [
        "First, we expand: $(x+1)^2 = x^2 + 2x + 1$.",
        " Then e.g. Mr. Euler says $x = 3.5$ is fine.",
        " So we get\n",
        "\\begin{align*}\n",
        "x &= \\frac{a = b}{2} \\\\\n",
        "&= 7. And so\n",
        "\\end{align*}\n",
        "\n  The answer is $\\boxed{7}$.",
        "\n#### 7",
    ]


def test_math_recognises_sentence_ends_before_the_next_sentence_begins() -> None:
    """After a digit or a single letter, the mark counts only together with white space."""
    assert steps_of("math", "So x = 3.5. Then y = 7. We use n! = 6! now? Yes! e.g. a) ... b") == [
        "So x = 3.5. ",
        "Then y = 7. ",
        "We use n! = 6! now?",
        " Yes!",
        " e.g. a) .",
        ".. b",
    ]
    assert build_splitter("math")(["x", " =", " ", "3", ".", " Then", " y", ".", "\n", ""]) == (6, 9, 10)


def test_math_cuts_long_steps_at_commas_and_equals_signs() -> None:
    words = (
        "the first of the summands is a, the second of the summands is 1,000, the third one is c and the fourth is d"
    )
    assert len(words) == 107
    assert steps_of("math", words + ", the end") == [words + ",", " the end"]
    assert steps_of("math", words[:90] + " for 2,000, and 3") == [words[:90] + " for 2,000, ", "and 3"]
    assert steps_of("math", words[:96] + " for it and 3") == [words[:96] + " for it and", " 3"]
    chain = "$" + " = ".join(f"\\frac{{{n} = n}}{{{'9' * 20}}}" for n in range(5)) + "$"
    assert [len(piece) for piece in steps_of("math", chain)] == [111, 73]  # never inside the braces
    assert steps_of("math", chain)[1].startswith(" \\frac{3")
    protected = "$(" + "a, " * 60 + "b)$"
    assert steps_of("math", protected) == [protected]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a $ b. C\nd. E", ["a $ b. C\n", "d. ", "E"]),  # $ ends at the newline
        ("a \\( bc. C\nde. E", ["a \\( bc. C\n", "de.", " E"]),
        ("a \\[ bc. C\nde. E\n\nfg. H", ["a \\[ bc. C\n", "de. E\n", "\nfg.", " H"]),  # \[ at the blank line
        ("\\begin{x} bc. C \\end{y} de. E \\end{x} fg. H", ["\\begin{x} bc. C \\end{y} de. E \\end{x} fg.", " H"]),
        ("ab \\$5. cd. E", ["ab \\$5. ", "cd.", " E"]),  # an escaped dollar sign opens no formula
        ("$$ab. C $ de. E$$ fg. H", ["$$ab. C $ de. E$$ fg.", " H"]),
    ],
)
def test_math_sentences_do_not_end_inside_formulas(text: str, steps: list[str]) -> None:
    assert steps_of("math", text) == steps


@pytest.mark.parametrize("token", ["\\[", "\\begin{a}", "\\begin{a", "$", "$$", "{", ",", "a.\n", "\n", " "])
def test_math_is_linear_in_the_number_of_formulas(token: str) -> None:
    """A search for the end of every formula would take minutes here. Case 24."""
    tokens = [token] * 100_000
    assert build_splitter("math")(tokens)[-1] == len(tokens)


def test_cutpoints_end_after_every_nth_uncertain_token() -> None:
    tokens = ["a", " b", " ", "c", "d", "e", "f", "g", ""]
    sure, unsure = math.log(0.95), math.log(0.4)
    logprobs = [unsure, sure, unsure, unsure, sure, unsure, unsure, unsure, unsure]
    split = build_splitter("cutpoints:2:0.5")
    assert split(tokens, logprobs) == (3, 6, 8, 9)  # EOS is a separate step
    assert build_splitter("cutpoints")(tokens, logprobs) == (7, 9)
    with pytest.raises(ValueError, match="9 tokens but 0 log-probabilities"):
        split(tokens)


def test_regex_splits_after_matches() -> None:
    assert steps_of("regex:;", "a; b;; c;") == ["a;", " b;", ";", " c;"]
    assert steps_of("regex:\\n+(?=Step)", "Step 1 x\nStep 2 y") == ["Step 1 x\nStep", " 2 y"]
    assert steps_of("regex:[.]$", "1.5 a.\nb") == ["1.", "5 a.", "\nb"]  # the pattern does not see later tokens
    assert steps_of("regex:^b", "ab\nbc") == ["ab\nb", "c"]
    assert steps_of("regex:x.*y", "x" + 150 * "-" + "yz") == ["x" + 150 * "-" + "y", "z"]
    assert len(steps_of("regex:x.*y", "x" + 250 * "-" + "yz")) == 1  # a match starts at most 200 characters before
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
    assert build_splitter("math")(texts) == (5, 10)
