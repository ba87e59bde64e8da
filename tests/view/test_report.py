"""The report of a run: its numbers, and hostile text in it."""

from __future__ import annotations

import base64
import html
import inspect
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import vineppo
from tests.view.rows import row, run_with
from vineppo.cli.main import main
from vineppo.config.load import config_to_dict
from vineppo.config.offline import OfflineConfig
from vineppo.config.schema import Config, LearnerConfig
from vineppo.run.directory import RunDirectory
from vineppo.training import loop
from vineppo.training.configure import build_config
from vineppo.view.documents import Block, Heading, Items, Paragraph, Preformatted, Table, to_html, to_markdown
from vineppo.view.report import changed_settings, telling_responses, write_report, write_viewer
from vineppo.view.trained import MAX_TOKENS, report_finished

LINES = ["x=1\n", "y=2\n", "#3"]
PNG = b"\x89PNG\r\n\x1a\n not a whole image"
SUMMARY: dict[str, Any] = {
    "label": "VinePPO", "seed": 3, "recipe": "judgement", "finish_reason": "tokens", "iterations": 60, "updates": 1200,
    "accuracy_before": {"mean": 0.19921875, "low": 0.166015625, "high": 0.234375},
    "accuracy_after": {"mean": 0.9609375, "low": 0.943359375, "high": None},
    "greedy_before": None, "greedy_after": None, "seconds": 62.4, "seconds_eval": 9.4,
    "tokens": {"rollouts": 180327, "mc": 1948758, "generated": 2129085, "trained": 360654},
    "peak_memory_bytes": 718790656, "warnings": ["the reward fell"],
}  # fmt: skip
EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e``` `| [x](javascript:alert(1))"


def finished_run(path: Path, **summary: Any) -> RunDirectory:
    """Return a run with two iterations of known rows, a summary and one plot."""
    run_with(path, row(LINES, 0.0, [0.75, 0.25, 0.0]), row(LINES, 1.0))
    later = [
        row(LINES, 1.0, [0.75, 0.0, 0.5]), row(LINES, 0.0, [0.25, 1.0, 1.0]), row(LINES, 0.0, [0.5, 0.5, 0.5]),
        row(LINES, 1.0, [0.5, 0.25, 0.75]) | {"kind": "sample"},
    ]  # fmt: skip
    later[2] |= {"finish_reason": "length"}
    run_with(path, *(entry | {"iteration": 7} for entry in later), iteration=7)
    run = RunDirectory.open(path)
    run.write_summary({**SUMMARY, **summary})
    (run.plots / "accuracy.png").write_bytes(PNG)
    return run


class Reader(HTMLParser):
    """Collects the tags, attributes and text of an HTML file."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_has_the_numbers_of_the_run(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    markdown, page = (path.read_text() for path in write_report(run.path))
    assert markdown.startswith("# VinePPO, seed 3, judgement\n")
    assert "| before training | 19.9% | 16.6% to 23.4% |\n| after training | 96.1% | - |\n" in markdown
    assert "Change: +76.2 points." in markdown
    assert "| updates | 1,200 |  |" in markdown
    assert "| generated tokens | 2,129,085 | 180,327 in rollouts, 1,948,758 in MC rollouts |" in markdown
    assert "| trained tokens | 360,654 | counted in every epoch |" in markdown
    assert "| seconds of training | 62 | and 9 of evaluation |" in markdown
    assert "- the reward fell\n" in markdown and "after 60 iterations (reason: tokens)" in markdown
    assert "![Accuracy and reward over updates](plots/accuracy.png)" in markdown
    text = Reader(page).text
    for part in ("96.1%", "2,129,085", "the reward fell", "value 1.00 to 0.00 (-1.00)", "#3"):
        assert part in text
    assert f"data:image/png;base64,{base64.b64encode(PNG).decode()}" in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == [] and "://" not in page


def test_the_most_telling_responses_are_shown(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    found = telling_responses(run.path)
    assert [(t.title, t.response.iteration, t.response.number) for t in found] == [
        ("Largest fall of the first iteration", 1, 1),
        ("Largest fall of the newest iteration", 7, 2),
        ("Right by wrong steps", 7, 1),
        ("Cut off", 7, 3),
    ]
    assert [t.entry and t.entry.step and t.entry.step.number for t in found] == [1, 3, 1, None]
    markdown = write_report(run.path)[0].read_text()
    assert "### Largest fall of the newest iteration: value 1.00 to 0.00 (-1.00)" in markdown
    # The marked step is the one of the list, and the rows are those that `vineppo show` prints.
    assert [line for line in markdown.splitlines() if line.startswith(">")] == [
        ">1  0.75 [0.43, 0.92]  -0.50 x=1",
        ">3  1.00 [0.70, 1.00]  -1.00 #3",
        ">1  0.75 [0.43, 0.92]  -0.75 x=1",
        ">3  0.50 [0.23, 0.77]  -0.50 #3",
    ]
    assert f"vineppo show {run.path} 7 2 --step 3" in markdown.replace("\\", "")


def test_the_page_has_the_colours_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    page = write_report(finished_run(tmp_path / "run").path)[1].read_text()
    # Step 3 of the largest fall is orange (the darkest), step 1 is blue: 0.25 to 1.00.
    assert re.search(r'<span style="[^"]*background-color: #f58231">#3</span>', page)
    assert re.search(r'<span style="[^"]*background-color: #4a98c9">x=1</span>', page)


def test_settings_that_differ_from_the_defaults() -> None:
    config = Config(algorithm="grpo", learner=LearnerConfig(lr=0.25, advantage_scaling="std"))
    assert changed_settings(config_to_dict(config)) == [
        ("algorithm", "grpo", "vineppo"),
        ("learner.lr", "0.25", "0.0001"),
        ("learner.advantage_scaling", "std", "none"),
    ]
    vine = config_to_dict(build_config({}, "vineppo", {"vineppo.num_mc_rollouts": "4", "run.report_to": "wandb"}))
    assert changed_settings(vine) == [("run.report_to", "wandb", "(none)"), ("vineppo.num_mc_rollouts", "4", "9")]
    assert changed_settings(config_to_dict(OfflineConfig(lr=0.5))) == [("lr", "0.5", "0.0001")]
    assert changed_settings({**config_to_dict(Config()), "mine": {"trace": True}}) == [("mine.trace", "true", "-")]


def test_hostile_text_is_never_markup(tmp_path: Path) -> None:
    clean = finished_run(tmp_path / "clean", label="A")
    expected = Reader(write_report(clean.path)[1].read_text())
    entry = row([f"{EVIL}\n", "#3"], 0.0, [0.75, 0.25])
    path = run_with(tmp_path / "run", entry | {"prompt": EVIL, "answer": EVIL, "problem_id": EVIL})
    run = RunDirectory.open(path)
    run.write_config({**run.config, "model": {"path": EVIL}, "mine": {EVIL: EVIL}})
    run.write_summary({**SUMMARY, "label": EVIL, "recipe": EVIL, "warnings": [EVIL]})
    markdown, page = (path.read_text() for path in write_report(path))
    found = Reader(page)
    assert set(found.tags) <= set(expected.tags) - {"img"}
    assert {name for name, _ in found.attributes} <= {name for name, _ in expected.attributes}
    assert "alert" not in " ".join(value for _, value in found.attributes)
    assert found.text.count("<script>alert(1)</script>") >= 6  # as text
    for text in (markdown, page):
        assert not {"\x1b", "\u202e"} & set(text)
        assert r"\x1b[2J" in text or r"\\x1b\[2J" in text
    # In Markdown, all of it is escaped outside of the preformatted blocks, and no such block ends early.
    fences = re.findall(r"^(`{3,})(text)?$", markdown, re.M)
    assert [fence for fence, _ in fences] == ["````"] * len(fences) and [kind for _, kind in fences][::2] == ["text"]
    outside = re.sub(r"^````text$.*?^````$", "", markdown, flags=re.M | re.S)
    assert not re.search(r"(?<!\\)(<|\[x\]|`)", outside)


def test_blocks_as_markdown_and_html(tmp_path: Path) -> None:
    blocks: list[Block] = [
        Heading("# a_b", 1), Paragraph("- x\n1. y"), Paragraph("12. y"), Paragraph("1.5 points"), Paragraph("+3"),
        Items(("* a", "b|c", "5-9", "-5")), Table(("k|", "v"), (("a\nb", "<i>"),)), Preformatted("a``b\n"),
    ]  # fmt: skip
    assert to_markdown(blocks, tmp_path).split("\n\n") == [
        r"# \# a\_b", r"\- x 1. y", r"12\. y", "1.5 points", r"\+3", "- \\* a\n- b\\|c\n- 5-9\n- \\-5",
        "| k\\| | v |\n| --- | --- |\n| a b | \\<i\\> |", "```text\na``b\n```\n",
    ]  # fmt: skip
    page = to_html(blocks, "<t>")
    assert "<title>&lt;t&gt;</title>" in page and "<td>&lt;i&gt;</td>" in page
    assert "<h1># a_b</h1>" in page and "default-src 'none'" in page


def test_a_long_response_is_shortened(tmp_path: Path) -> None:
    lines = [f"line {i}\n" for i in range(200)]
    run = run_with(tmp_path / "run", row(lines, 0.0, [0.5] * 200))
    markdown, page = (path.read_text() for path in write_report(run))
    for text in (markdown, page):
        assert "more lines)" in text and "line 10" in text and "line 100" not in text
    assert Reader(page).tags.count("span") == page.count("</span>")


def test_runs_without_summary_metrics_or_responses_have_a_report(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "new", Config())
    markdown = write_report(run.path)[0].read_text()
    assert markdown.startswith("# Run new\n") and "has not finished; 0 iterations so far" in markdown
    assert "No accuracy was measured." in markdown and "has saved no responses yet" in markdown.replace("\\", "")
    counts = {"updates": 8, "tokens/rollouts": 10, "tokens/mc": 0, "tokens/generated": 10, "tokens/trained": 20}
    for iteration, accuracy in ((0, 0.25), (1, None), (2, 0.5)):
        bounds = {"eval/accuracy": accuracy, "eval/accuracy_low": 0.125, "eval/accuracy_high": 0.75}
        run.append_metrics({"iteration": iteration, **counts, "seconds/train": 3.0, **bounds})
    markdown = write_report(run.path)[0].read_text()
    assert "| iteration 0, validation problems | 25.0% | 12.5% to 75.0% |" in markdown
    assert "| iteration 2, validation problems | 50.0% | 12.5% to 75.0% |" in markdown
    assert "| generated tokens | 10 | 10 in rollouts |" in markdown and "| seconds of training | 3 |  |" in markdown
    run.write_summary({"finish_reason": "interrupted"})
    assert "was interrupted after 2 iterations" in write_report(run.path)[0].read_text()


def test_the_report_links_to_the_viewer(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert "view.html" not in write_report(run.path)[0].read_text()
    assert write_viewer(run.path) == run.path / "view.html"
    markdown, page = (path.read_text() for path in write_report(run.path))
    assert "(view.html)" in markdown and '<a href="view.html">' in page
    entry = telling_responses(run.path)[0].entry
    assert entry is not None and entry.step is not None
    place = f"view.html#r={entry.response.iteration}.{entry.response.number}&step={entry.step.number}"
    assert f"[This response in the credit viewer]({place})" in markdown
    assert f'<a href="{html.escape(place)}">' in page


@pytest.mark.parametrize(("tokens", "written"), [(MAX_TOKENS, True), (MAX_TOKENS + 1, False)])
def test_only_the_page_of_a_short_run_is_written_at_its_end(tmp_path: Path, tokens: int, written: bool) -> None:
    run = finished_run(tmp_path / "run")
    assert report_finished(run.path, {**SUMMARY, "tokens": {"rollouts": tokens}}) == run.path / "report.html"
    assert (run.path / "view.html").is_file() is written
    assert ("vineppo report" in (run.path / "report.md").read_text()) is not written


def test_an_interrupted_run_gets_no_report(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert report_finished(run.path, {**SUMMARY, "finish_reason": "interrupted"}) is None
    assert not (run.path / "report.html").exists()


def test_a_run_writes_its_report_at_the_end(vineppo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(vineppo_run)]) == 0
    names = ("report.md", "report.html", "view.html")
    assert capsys.readouterr().out.splitlines() == [str(vineppo_run / name) for name in names]
    markdown = (vineppo_run / "report.md").read_text()
    assert "![Time of each phase](plots/seconds.png)" in markdown and "Largest fall of the newest" in markdown


def test_a_run_from_python_is_like_one_from_the_command_line(tmp_path: Path) -> None:
    few: dict[str, Any] = {
        "run.iterations": 1, "run.checkpoint_every": 0, "rollouts.num_problems": 2, "rollouts.group_size": 2,
        "learner.minibatch_size": 4, "eval.every": 0, "eval.final_num_problems": 0,
    }  # fmt: skip
    settings = {**few, "run.dir": str(tmp_path / "python")}
    config = vineppo.build_config(vineppo.load_recipe("judgement"), "grpo", settings)
    assert vineppo.train(config)["finish_reason"] == "iterations"
    options = [word for key, value in few.items() for word in (f"--{key}", str(value))]
    assert main(["train", "--algorithm", "grpo", "--run.dir", str(tmp_path / "command"), *options]) == 0
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("python", "command")]
    assert names[0] == names[1] and {"report.md", "report.html", "view.html"} <= set(names[0])
    assert inspect.signature(vineppo.train) == inspect.signature(loop.train)


def test_a_report_that_fails_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path / "run")
    (run.path / "report.html").mkdir()
    with pytest.warns(UserWarning, match=r"the report could not be made .*make it with `vineppo report"):
        assert report_finished(run.path, SUMMARY) is None
    assert main(["report", str(run.path)]) == 2
    assert "cannot be made" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert main(["report"]) == 2


def test_damaged_responses_do_not_prevent_the_report(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    run.rollouts_of(7).write_bytes(b"no")
    assert write_viewer(run.path) is not None  # iteration 1 can be read
    (run.path / "view.html").unlink()
    run.rollouts_of(1).write_bytes(b"no")
    assert write_viewer(run.path) is None and not (run.path / "view.html").exists()
    assert "No responses can be shown: " in write_report(run.path)[0].read_text()
