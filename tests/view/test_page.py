"""The credit viewer in a browser (headless Chromium): every part of the page, many responses, hostile text."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.view.rows import row, run_with
from tests.view.test_foreign import RECORDED
from tests.view.test_viewer_file import served
from vineppo.view.page import write_page

pytestmark = pytest.mark.real

LINES = ["one plus one is two\n", "two plus two is five\n", "so the answer\n", "is 4"]
HOSTILE = (
    "<script>window.hit=1</script>\n<img src=x onerror='window.hit=2'>\n</script><svg onload=window.hit=3>\n"
    "\u202edesrever\u202c \u2066isolated\u2069 zero\u200bwidth \x1b[31mred \x00 \u2028 &lt;b&gt; {{meta}} ${hit}\n"
    "a\u0301\u0302\u0303\u0304\u0305\u0306 javascript:window.hit=4"
)


def continuation(state: int, shared: int, text: str, reward: float, accepted: int | None = None) -> dict[str, Any]:
    return {
        "state": state, "shared": shared, "accepted": accepted, "num_tokens": len(text), "text": text, "reward": reward,
        "finish_reason": "stop",
    }  # fmt: skip


def response(lines: list[str], reward: float | None, values: Any = (), **columns: Any) -> dict[str, Any]:
    """Return a row whose token ids are code points, so that responses with equal starts share tokens."""
    ids = [ord(c) for line in lines for c in line]
    return {**row(lines, reward, values, **columns), "response_ids": ids, "token_entropies": [0.25] * len(ids)}


def rows_of(iteration: int) -> list[dict[str, Any]]:
    """Return four responses: a fall in the second step, a lucky one, a cut one, and one whose credit disagrees."""
    start = len(LINES[0])
    entries = [
        continuation(start, 9, "two plus two is four\nso 4", 1.0),
        continuation(start, 0, "no idea", 0.0),
        continuation(0, start + 3, LINES[0] + "two is all", 0.0),
    ]
    other = [LINES[0], "two plus two is four\n", "so the answer\n", "is 4"]
    changed = [0.25] * sum(map(len, LINES))  # positive everywhere, also where the value falls
    common = {"iteration": iteration, "problem_id": "train/7", "prompt": "What is two plus two?", "answer": "4"}
    second = {"iteration": iteration, "problem_id": f"train/{100 + iteration}", "prompt": f"Problem {iteration}: 1+1?"}
    return [
        response(LINES, 0.0, [0.5, 0.75, 0.25, 0.0], **common, continuations=entries),
        response(other, 1.0, [0.5, 0.75, 0.1, 0.9], **common),
        response(["one plus one is th"], 0.0, [0.5], **second, finish_reason="length"),
        response(LINES, 1.0, [1.0, 1.0, 0.0, 1.0], **second, advantages=changed, num_mc_rollouts=64),
    ]


def run_a(path: Path) -> Path:
    for iteration in (1, 2, 3):
        run_with(path, *rows_of(iteration), iteration=iteration)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("the program chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that opens runs in a page. At the end, nothing may stand on the console."""
    problems: list[str] = []
    contexts: list[Any] = []

    def opened(
        *runs: Path, fragment: str = "", address: str = "", width: int = 1440, height: int = 900, scheme: str = "light"
    ) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append("dialog"))
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        if not address:
            out = tmp_path / f"page{len(contexts)}.html"
            write_page(out, runs)
            address = out.as_uri()
        page.goto(address + fragment)
        page.locator("body[data-ready]").wait_for(timeout=20000)
        if address.startswith("file:"):
            assert {url.partition("#")[0] for url in requests} == {address}  # nothing else was asked for
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_a(tmp_path_factory.mktemp("runs") / "alpha")


def text(page: Any, selector: str) -> str:
    """Return the text of an element with single spaces."""
    return " ".join(page.locator(selector).inner_text().split())


def fragment(page: Any) -> str:
    return str(page.url.partition("#")[2])


def test_the_text_is_coloured_by_advantage(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha, fragment="#r=1.1")
    assert text(page, "#run-facts") == "VinePPO · 3 iterations · 12 responses"
    assert [page.locator(f".step[data-step='{n}'] .step-text").inner_text() for n in (1, 2, 3, 4)] == [
        line.rstrip("\n") for line in LINES
    ]
    shades = [page.locator(f".step[data-step='{n}'] .t").first.get_attribute("class") for n in (1, 2, 3, 4)]
    assert [name.split()[1] for name in shades] == ["p3", "n5", "n3", "z"]  # +0.25, -0.5, -0.25, 0 of 0.5
    assert text(page, ".step[data-step='2'] .gutter") == "2 0.75 −0.50"
    colour = "el => getComputedStyle(el).backgroundColor"
    assert page.locator(".step[data-step='2'] .t").first.evaluate(colour) == "rgb(236, 146, 51)"


def test_the_pointer_and_the_focus_show_numbers(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha, fragment="#r=1.1")
    page.locator(".step[data-step='2'] .t").nth(4).hover()
    shown = text(page, "#inspector")
    for part in (
        "Token “p”",
        "Probability 0.607",
        "Entropy 0.250 nats",
        "Advantage −0.500",
        "V before 2 0.750",
        "K 9",
        "95% interval 0.43 to 0.92",
        "V after 0.250",
    ):
        assert part in shown
    page.mouse.move(2, 2)
    page.locator("#text").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert "Token “n”" in text(page, "#inspector") and "V before 1 0.500" in text(page, "#inspector")
    assert fragment(page) == "r=1.1&step=1&token=1"


def test_the_curve_shows_the_values_and_scrolls_the_text(show: Callable[..., Any], tmp_path: Path) -> None:
    long = [f"step {i}\n" for i in range(200)]
    run = run_with(tmp_path / "long", response(long, 1.0, [i / 200 for i in range(200)]))
    page = show(run, fragment="#r=1.1&step=1")
    assert page.locator("svg.curve .band").count() == 1
    assert page.locator("svg.curve").get_attribute("aria-label") == "Value of 200 states, from 0.00 to the reward 1.00"
    assert not page.locator(".step[data-step='190']").evaluate(
        "el => el.getBoundingClientRect().top < innerHeight - 100"
    )
    box = page.locator("svg.curve").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.95)
    step = int(re.findall(r"step=(\d+)", fragment(page))[0])
    assert 180 <= step <= 200
    place = page.locator(f".step[data-step='{step}']").bounding_box()
    assert 0 < place["y"] < 850
    assert text(page, "#panel h2") == f"Step {step} of 200"


def test_a_few_values_have_whiskers_and_points(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha, fragment="#r=1.1")
    assert page.locator("svg.curve .whisker").count() == 4
    assert page.locator("svg.curve circle.state").count() == 4
    assert page.locator("svg.curve .reward-point").count() == 1
    assert [page.locator(f"svg.curve .change.{name}").count() for name in ("up", "down", "flat")] == [1, 2, 1]


def test_a_state_opens_its_continuations(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha, fragment="#r=1.1&step=2&tab=branches")
    panel = text(page, "#panel")
    assert "V = 0.750, the mean of 9 Monte-Carlo rollouts, 95% interval 0.43 to 0.92." in panel
    assert "Continuations from this state 1 of 2 right" in panel
    first = page.locator("#panel .branches li").first
    start = len(LINES[0])
    assert first.locator(".shared").inner_text() == "two plus "
    assert first.locator(".branch-text").inner_text() == "two plus ▸two is four\nso 4"
    assert f"leaves in step 2, after {start + 9} tokens" in first.inner_text()
    assert "1 continuation of earlier states that pass through this state" in panel
    first.locator("button.link").click()
    assert fragment(page) == f"r=1.1&step=2&token={start + 9}&tab=branches"


def test_a_real_run_shows_alternatives_with_what_they_earned(
    show: Callable[..., Any], counterfactual_run: Path
) -> None:
    from vineppo.view.records import responses_of

    found = next(r for i in (1, 2) for r in responses_of(counterfactual_run, i) if r.alternatives and r.continuations)
    position = found.alternatives[0].position
    number = next(s.number for s in found.steps if s.start <= position < s.end)
    page = show(counterfactual_run, fragment=f"#r={found.iteration}.{found.number}&step={number}&tab=branches")
    cells = page.locator("#panel table tbody tr").first.locator("td").all_inner_texts()
    assert cells[2].startswith("−") and cells[3].strip() == "✗ 0"
    assert page.locator("#steps .t.fork.paid").count() == len({a.position for a in found.alternatives})
    page.keyboard.press("1")
    page.locator("#panel", has_text="It is not a change of value").wait_for()
    assert page.locator("svg.curve .bar.up").count() >= 1


def test_alternatives_of_continuations_show_what_they_earned(show: Callable[..., Any], tmp_path: Path) -> None:
    """With `vineppo.alternatives`, a continuation leaves the response behind the beginning of its step."""
    start = len(LINES[0])
    place = start + 9
    entries = [
        continuation(start, 9, "two plus two is four", 1.0),
        continuation(start, 9, "two plus two is fixed", 0.0),
        continuation(start, 9, "two plus two is fourteen", 0.0),
        continuation(start, 9, "two plus two is four", 1.0),
        continuation(0, place, LINES[0] + "two plus two is four", 1.0),  # of the state before
        continuation(start, 2, "two-two", 0.0),  # leaves at another place
    ]
    other = {"position": place, "token_id": 1, "text": "two is four", "advantage": 0.25}
    longer = {"position": place, "token_id": 2, "text": "two is fourteen", "advantage": -0.5}
    lower = {**other, "advantage": -0.125}
    changed = response(LINES, 0.0, [0.5, 0.75, 0.25, 0.0], continuations=entries)
    page = show(run_with(tmp_path / "run", {**changed, "alternatives": [other, lower, longer, other, other]}))
    page.keyboard.press("2")
    rows = page.locator("#panel table tbody tr")
    cells = [[" ".join(c.split()) for c in rows.nth(n).locator("td").all_inner_texts()] for n in range(rows.count())]
    assert [row[1:] for row in cells] == [
        ["“two␣is␣four”", "+0.250 × 3", "✓ 1 × 3"],
        ["“two␣is␣four”", "−0.125", ""],
        ["“two␣is␣fourteen”", "−0.500", "✗ 0"],
    ]


def test_why_shows_the_subtraction_and_the_telescoping_sum(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha, fragment="#r=1.1")
    assert fragment(page) == "r=1.1&step=2"  # the step with the lowest advantage
    panel = text(page, "#panel")
    assert "V after 0.250 K = 9" in panel and "V before 0.750 K = 9" in panel and "change of V −0.500" in panel
    assert "✓ This is the recorded advantage of the step." in panel
    assert "V(prompt) 0.500 + advantages −0.500 = 0.000" in panel
    assert "✓ The step advantages telescope to the reward 0.000." in panel
    assert page.locator("#panel .stair").count() == 6


def test_advantages_that_do_not_fit_are_reported(show: Callable[..., Any], tmp_path: Path) -> None:
    damaged = {**response(LINES, 1.0, [0.5, 0.5, 0.5, 0.5]), "step_advantages": [0.25, 0.0, 0.0, 0.5]}
    page = show(run_with(tmp_path / "run", damaged), fragment="#r=1.1&step=1")
    assert "≠ The recorded advantage is +0.250, which is not this difference." in text(page, "#panel")
    assert "≠ The reward is 1.000; the step advantages do not add up to it." in text(page, "#panel")


def test_the_group_is_a_tree_with_rewards(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha, fragment="#r=2.1&tab=group")
    page.locator(".tree").wait_for()
    assert "2 responses to this problem in iteration 2" in text(page, "#panel")
    assert page.locator(".tree > li > .node .node-mean").inner_text() == "0.50"
    assert page.locator(".tree > li > ul > li").count() == 2
    assert "two plus two is f" in page.locator(".tree > li > .node .node-text").inner_text()
    assert page.locator(".tree .reward.right").count() == 1 and page.locator(".tree .reward.wrong").count() == 1
    page.locator(".tree button", has_text="response 2").click()
    page.locator("body[data-ready='0.5']").wait_for()
    assert fragment(page).startswith("r=2.2")


def test_the_tree_of_one_response_has_its_continuations(show: Callable[..., Any], tmp_path: Path) -> None:
    alone = {**rows_of(1)[0], "problem_id": "train/1"}
    page = show(run_with(tmp_path / "run", alone), fragment="#r=1.1&tab=group")
    page.locator(".tree").wait_for()
    assert page.locator(".tree .leaf", has_text="continuation").count() == 3
    assert page.locator(".tree > li > .node .node-mean").inner_text() == "0.25"


def test_one_response_under_several_credits(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha, fragment="#r=1.1&tab=credits")
    assert page.locator(".credit-row.head span").all_inner_texts() == ["Step", "VinePPO", "GRPO", "RLOO", "TEMPO"]
    second = page.locator(".credit-row").nth(2).locator("[role=cell]").all_inner_texts()
    assert second[0] == "−0.50" and second[1] == "−0.71" and second[2] == "−1.00"
    assert "Steps with the same sign as recorded: GRPO 2 of 4, RLOO 2 of 4" in text(page, "#panel")


def test_the_recorded_credit_is_told_from_the_computed_one(show: Callable[..., Any], tmp_path: Path) -> None:
    page = show(run_with(tmp_path / "run", *rows_of(1), algorithm="grpo"), fragment="#r=1.1&tab=credits")
    assert page.locator(".credit-row.head span").all_inner_texts() == ["Step", "GRPO, run", "GRPO", "RLOO", "TEMPO"]


def test_the_critic_stands_beside_the_other_credits(show: Callable[..., Any], tmp_path: Path) -> None:
    values = [0.5] * len(LINES[0]) + [0.25] * len("".join(LINES[1:]))
    critic = {**response(LINES, 1.0, advantages=[0.1] * len("".join(LINES))), "token_values": values}
    page = show(run_with(tmp_path / "run", critic, algorithm="ppo"), fragment="#r=1.1&tab=credits")
    assert page.locator(".credit-row.head span").all_inner_texts() == ["Step", "PPO", "Critic"]
    rows = [page.locator(".credit-row").nth(n).locator("[role=cell]").all_inner_texts() for n in range(1, 5)]
    assert [cells[0] for cells in rows] == ["+0.10"] * 4
    assert rows[0][1] == f"−{0.25 / len(LINES[0]):.2f}" and rows[1][1] == "±0.00"
    assert rows[3][1] == f"+{0.75 / len(LINES[3]):.2f}"
    assert "This response has no other response to compare with." in text(page, "#panel")


def test_the_queues(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha)
    counts = {b.get_attribute("data-queue"): b.inner_text().split()[-1] for b in page.locator("#queues button").all()}
    assert counts == {"all": "12", "drops": "12", "lucky": "6", "truncated": "3", "disagree": "3"}
    expected = {
        "d": ("12 responses", "1.4", "step 2: value 1.00 to 0.00 (-1.00)"),
        "l": ("6 responses", "1.4", "step 2: right, but the value after this step was 0.00 (-1.00 on the way)"),
        "t": ("3 responses", "1.3", "cut off after 18 tokens"),
        "g": ("3 responses", "1.4", "step 2: value -1.00, but trained with +0.25 per token"),
    }
    for key, (status, number, reason) in expected.items():
        page.keyboard.press(key)
        assert text(page, "#list-status") == status
        assert page.locator(".row .row-id").first.inner_text() == number
        assert page.locator(".row .row-more").first.inner_text() == reason
    page.locator(".row").nth(1).click()
    page.locator("body[data-ready='0.7']").wait_for()
    assert fragment(page) == "r=2.4&step=2&queue=disagree"


def test_filters_and_search(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha)

    def shown() -> list[str]:
        return list(page.locator(".row .row-id").all_inner_texts())

    page.locator("#filter-iteration").select_option("2")
    assert shown() == ["2.1", "2.2", "2.3", "2.4"]
    page.locator("#filter-reward").select_option("right")
    assert shown() == ["2.2", "2.4"]
    page.locator("button", has_text="clear filters").click()
    assert len(shown()) == 12
    page.locator("#filter-finish").select_option("length")
    assert shown() == ["1.3", "2.3", "3.3"] and text(page, "#list-status").startswith("3 of 12 responses")
    page.locator("button", has_text="clear filters").click()
    page.locator("#search").fill("Is FOUR")
    page.locator("#list-status", has_text="3 of 12 responses").wait_for()
    assert shown() == ["1.2", "2.2", "3.2"] and "q=Is+FOUR" in fragment(page)
    page.locator("#search").fill("Problem 3")
    page.locator("#list-status", has_text="2 of 12 responses").wait_for()
    assert shown() == ["3.3", "3.4"]
    page.locator("#search").fill("nowhere")
    page.locator(".empty", has_text="No response passes the filters.").wait_for()


def test_a_problem_over_the_iterations(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha, fragment="#r=2.1&tab=problem")
    assert "6 responses in 3 iterations" in text(page, "#panel")
    assert page.locator(".problem-table tbody tr").count() == 3
    assert page.locator(".problem-table tbody tr").first.locator("td").all_inner_texts()[:2] == ["1", "0.50"]
    page.locator(".problem-table .chip").nth(5).click()
    page.locator("body[data-ready='0.9']").wait_for()
    page.locator("button", has_text="List them").click()
    assert page.locator(".row .row-id").all_inner_texts() == ["1.1", "1.2", "2.1", "2.2", "3.1", "3.2"]


def test_two_runs_are_compared(show: Callable[..., Any], alpha: Path, tmp_path: Path) -> None:
    beta = tmp_path / "beta"
    for iteration in (1, 2):
        run_with(beta, *[{**r, "reward": 1.0} for r in rows_of(iteration)], iteration=iteration, algorithm="rloo")
    page = show(alpha, beta, fragment="#r=1.1&tab=compare")
    page.locator(".sides").wait_for()
    table = page.locator("#panel table").first.locator("tbody tr")
    assert table.nth(0).locator("td").all_inner_texts() == ["A", "alpha", "VinePPO", "3", "0.50", "0.50"]
    assert table.nth(1).locator("td").all_inner_texts() == ["B", "beta", "RLOO", "2", "1.00", "1.00"]
    assert page.locator(".side .reward").all_inner_texts() == ["✗ 0", "✓ 1"]
    assert "3 problems in both runs" in text(page, "#panel")
    differences = page.locator("#panel table").last.locator("tbody tr td:last-child").all_inner_texts()
    assert differences == ["+0.50", "+0.50", "+0.50"]
    assert page.locator("svg.overview polyline").count() == 2
    page.keyboard.press("b")
    page.locator("#run-name", has_text="beta").wait_for()
    page.locator("body[data-ready='1.0']").wait_for()
    assert fragment(page).startswith("run=b&r=1.1")


def test_links_keep_the_place(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha, fragment="#r=2.2&step=3&token=45&tab=credits&queue=lucky&it=2&reward=right")
    again = fragment(page)
    assert again == "r=2.2&step=3&token=45&tab=credits&queue=lucky&it=2&reward=right"
    assert page.locator(".step.on").get_attribute("data-step") == "3"
    assert page.locator("#tab-credits").get_attribute("aria-selected") == "true"
    assert text(page, ".row.selected .row-id") == "2.2"
    page.reload()
    page.locator("body[data-ready='0.5']").wait_for()
    assert fragment(page) == again
    page.locator("#list").focus()
    page.keyboard.press("ArrowUp")
    page.locator("body[data-ready='0.7']").wait_for()
    page.go_back()
    page.locator("body[data-ready='0.5']").wait_for()
    assert fragment(page).startswith("r=2.2")
    wrong = show(alpha, fragment="#r=99.1&step=x&tab=nothing&queue=constructor&run=b")
    assert wrong.locator(".step.on").count() == 1 and wrong.locator("#tab-why").get_attribute("aria-selected") == "true"


def test_the_keyboard_alone_suffices(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha, fragment="#r=1.1")
    press = page.keyboard.press
    press("?")
    assert page.locator("#help").is_visible() and "next / previous response" in text(page, "#help")
    press("Escape")
    assert not page.locator("#help").is_visible()
    press("j")
    page.locator("body[data-ready='0.1']").wait_for()
    press("n")
    assert "step=3" in fragment(page)  # the lowest step of 1.2 is the second one
    press("p")
    press("p")
    assert "step=1" in fragment(page)
    for number, name in enumerate(("why", "branches", "group", "credits", "problem"), start=1):
        press(str(number))
        assert page.locator(f"#tab-{name}").get_attribute("aria-selected") == "true"
    press("]")
    assert "it=1" in fragment(page)
    press("[")
    assert "it=" not in fragment(page)
    press("/")
    page.keyboard.type("four")
    press("Enter")
    page.locator("#list-status", has_text="3 of 12").wait_for()
    assert page.evaluate("() => document.activeElement.id") == "list"
    press("End")
    page.locator("body[data-ready='0.9']").wait_for()
    press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "text"
    # Every control is reached by the tabulator, and has a name.
    reached = set()
    for _ in range(60):
        press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id || document.activeElement.textContent"))
    assert {"list", "text", "panel", "search", "filter-iteration", "theme", "help-button"} <= reached
    unnamed = (
        "() => [...document.querySelectorAll('button, input, select')]"
        ".filter(e => !(e.textContent.trim() || e.getAttribute('aria-label'))).length"
    )
    assert page.evaluate(unnamed) == 0


@pytest.mark.parametrize(("scheme", "background"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(25, 28, 33)")])
def test_both_colour_schemes(show: Callable[..., Any], alpha: Path, scheme: str, background: str) -> None:
    page = show(alpha, fragment="#r=1.1", scheme=scheme)
    of_panel = "() => getComputedStyle(document.getElementById('response')).backgroundColor"
    assert page.evaluate(of_panel) == background
    page.keyboard.press("c")
    assert page.evaluate(of_panel) == "rgb(255, 255, 255)"
    page.keyboard.press("c")
    assert page.evaluate(of_panel) == "rgb(25, 28, 33)"
    assert text(page, "#theme") == "Colours: dark"
    page.reload()
    page.locator("body[data-ready]").wait_for()
    assert page.evaluate(of_panel) == "rgb(25, 28, 33)"  # the choice is kept


def test_a_phone_shows_everything_without_scrolling_sideways(show: Callable[..., Any], alpha: Path) -> None:
    page = show(alpha, fragment="#r=1.1", width=390, height=844)
    wide = "() => document.documentElement.scrollWidth"
    hidden = (
        "() => [...document.querySelectorAll('main *')].filter(e => e.getClientRects().length"
        " && !e.closest('.node-text, .branch-text, #inspector, #tabs, .row, .credit-row, .excerpt, svg')"
        " && e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    for name in ("List", "Response", "Details"):
        page.locator("#views button", has_text=name).click()
        assert page.evaluate(wide) <= 390 and page.evaluate(hidden) == 0
    for number in range(1, 6):
        page.keyboard.press(str(number))
        page.wait_for_timeout(50)
        assert page.evaluate(wide) <= 390 and page.evaluate(hidden) == 0
    page.locator("#views button", has_text="List").click()
    page.locator(".row").nth(1).click()
    page.locator("body[data-ready='0.1']").wait_for()
    assert page.locator("#text").is_visible() and page.locator("svg.curve").is_visible()
    assert page.locator("#steps .step-text").first.evaluate("el => parseFloat(getComputedStyle(el).fontSize)") >= 12


def test_hostile_text_stays_text(show: Callable[..., Any], tmp_path: Path) -> None:
    lines = [line + "\n" for line in HOSTILE.split("\n")]
    hostile = response(
        lines, 1.0, [0.5] * len(lines), prompt=HOSTILE, answer=HOSTILE, problem_id=HOSTILE, finish_reason=HOSTILE[:40],
        continuations=[continuation(0, 0, HOSTILE, 1.0)],
        alternatives=[{"position": 0, "token_id": 1, "text": HOSTILE, "advantage": -0.5}],
    )  # fmt: skip
    run = run_with(tmp_path / "<b>run", hostile, {**hostile, "reward": 0.0})
    page = show(run, fragment="#r=1.1&step=1")
    for number in range(1, 6):
        page.keyboard.press(str(number))
        page.wait_for_timeout(60)
        assert (
            page.evaluate(
                "() => document.querySelectorAll('main img, main script, main b img, main svg[onload]').length"
            )
            == 0
        )
    assert page.evaluate("() => window.hit") is None
    shown = page.locator("#steps").inner_text()
    assert "<script>window.hit=1</script>" in shown and "⟦RLO⟧desrever⟦PDF⟧ ⟦LRI⟧isolated⟦PDI⟧ zero⟦ZWSP⟧width" in shown
    assert "␛[31mred ␀ ⟦LSEP⟧ &lt;b&gt; {{meta}} ${hit}" in shown
    whole = page.evaluate("() => document.body.innerText")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\x1b]", whole)
    page.locator("#search").fill("onerror")
    page.locator("#list-status", has_text="2 responses").wait_for()
    assert page.evaluate("() => window.hit") is None and page.title() == "<b>run - vineppo"


def test_the_policy_blocks_scripts_that_are_added(browser: Any, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    write_page(out, [run_with(tmp_path / "run", response(LINES, 1.0, [0.5] * 4))])
    out.write_text(
        out.read_text().replace("</main>", "</main><script>window.hit=1</script><img src=x onerror='window.hit=2'>")
    )
    page = browser.new_page()
    page.goto(out.as_uri())
    page.locator("body[data-ready]").wait_for()
    assert page.evaluate("() => window.hit") is None
    page.close()


def test_a_megabyte_of_text_does_not_freeze_the_page(show: Callable[..., Any], tmp_path: Path) -> None:
    text_of = "x" * 1_000_000
    one = {**row([text_of], 1.0), "response_ids": [1], "token_ends": [1_000_000], "num_tokens": 1}
    one |= {"token_advantages": [0.5], "sampler_logprobs": [-1.0]}
    lines = [f"line {i} of many\n" for i in range(60_000)]  # one token each
    many = {**row(["x"], 0.0), "response": "".join(lines), "response_ids": [2] * 60_000, "num_tokens": 60_000}
    many |= {"token_ends": list(itertools.accumulate(map(len, lines))), "token_advantages": [0.5, -0.25] * 30_000}
    many |= {"sampler_logprobs": [-1.0] * 60_000}
    run = run_with(tmp_path / "run", one, many)
    page = show(run, fragment="#r=1.1")
    assert len(page.locator("#steps").inner_text()) < 20_000
    assert "992\u202f000 more characters" in page.locator("#steps").inner_text()
    page.keyboard.press("j")
    page.locator("body[data-ready='0.1']").wait_for()
    assert page.locator("#steps .t").count() < 5000
    assert page.locator("#more-text").is_visible()
    page.locator("#more-text").click()
    assert 3000 < page.locator("#steps .t").count() < 6000
    box = page.locator("svg.curve").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.9)
    assert page.locator("#steps .t").count() < 5000  # what stands between is not put on the page
    step = int(page.locator(".step.on").get_attribute("data-step"))
    assert step > 45_000 and 0 < page.locator(".step.on").bounding_box()["y"] < 850
    assert page.locator(".step.on .step-text").inner_text() == f"line {step - 1} of many"
    page.locator("#earlier-text").click()
    assert page.locator("#steps .step").first.get_attribute("data-step") not in (None, "1")
    page.keyboard.press("5")
    page.locator("#tab-problem[aria-selected='true']").wait_for()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with 10,048 responses."""
    path = tmp_path_factory.mktemp("large")
    for iteration in range(1, 158):
        rows = [
            response([f"step {n} of {iteration}\n", f"so {n % 7}\n", "end"], float(n % 2), [0.5, n / 64, 0.25],
                     iteration=iteration, problem_id=f"train/{iteration * 64 + n}",
                     prompt=f"Problem {n} of iteration {iteration}?")
            for n in range(64)
        ]  # fmt: skip
        run_with(path / "run", *rows, iteration=iteration)
    out = path / "page.html"
    contents = write_page(out, [path / "run"])
    assert contents.meta["left_out"] == [] and out.stat().st_size < 5_000_000
    return out


def test_ten_thousand_responses(show: Callable[..., Any], large: Path) -> None:
    """The first paint comes within 2 seconds: the best of three loads, because the machine may be busy."""
    page = show(address=large.as_uri())
    assert text(page, "#list-status") == "10 048 responses"
    assert page.locator(".row").count() < 60
    paints = []
    for _ in range(3):
        page.reload()
        page.locator("body[data-ready]").wait_for()
        paints.append(page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    assert min(paints) < 2000
    page.locator("#list").focus()
    page.keyboard.press("End")
    page.locator("body[data-ready='0.10047']").wait_for()
    assert text(page, ".row.selected .row-id") == "157.64"
    page.keyboard.press("PageUp")
    assert page.locator(".row").count() < 60
    page.locator("#search").fill("step 5 of 99")
    page.locator("#list-status", has_text=re.compile(r"^1 of 10.048 responses")).wait_for(timeout=30000)
    assert page.locator(".row .row-id").all_inner_texts() == ["99.6"]


def test_the_server_follows_a_run_that_goes_on(show: Callable[..., Any], tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", *rows_of(1), iteration=1)
    with served(run) as server:
        page = show(address=server.address, fragment="#r=1.2")
        assert text(page, "#live") == "following, iteration 1" and "4 responses" in text(page, "#run-facts")
        run_with(run, *rows_of(2), iteration=2)
        page.locator("#live-text", has_text="iteration 2").wait_for(timeout=15000)
        page.locator("#run-facts", has_text="8 responses").wait_for()
        assert fragment(page).startswith("r=1.2")  # the open response stays open
        page.keyboard.press("]")
        page.keyboard.press("]")
        assert page.locator(".row .row-id").all_inner_texts() == ["2.1", "2.2", "2.3", "2.4"]


def test_parts_that_were_left_out_are_named(show: Callable[..., Any], tmp_path: Path, large: Path) -> None:
    out = tmp_path / "small.html"
    contents = write_page(out, [large.parent / "run"], 700_000)
    assert out.stat().st_size <= 700_000 and contents.meta["left_out"]
    page = show(address=out.as_uri())
    page.locator("#left-out summary").click()
    assert "texts, steps and advantages of iterations" in text(page, "#left-out")
    missing = next(i for i in range(1, 158) if f"0/{i}/core" not in contents.chunks)
    page.locator("#filter-iteration").select_option(str(missing))
    page.locator(".row").nth(2).click()
    page.locator("#text .empty", has_text="was left out to keep the page small").wait_for()
    assert text(page, "#response-head").startswith("✗ 0 Iteration")


def test_a_file_of_another_trainer_is_shown(show: Callable[..., Any]) -> None:
    page = show(RECORDED, fragment="#r=1.2&step=2")
    assert text(page, "#run-facts") == "TRL completions · 1 iteration · 4 responses"
    lines = [page.locator(f".step[data-step='{n}'] .step-text").inner_text() for n in (1, 2, 3, 4)]
    assert lines == ["b=9*9 by rote = 8", "c=8+3 by rule = 1", "d=1+2 by rote = 3", "#### 3"]
    assert [text(page, f".step[data-step='{n}'] .gutter") for n in (1, 4)] == ["1 −0.71", "4 −0.71"]
    assert "advantage of the whole response, which is repeated" in text(page, "#panel")
    assert "Advantage of the response" in text(page, "#curve")
    assert "token" not in text(page, "#response-head")
    page.keyboard.press("d")
    assert text(page, "#list-status") == "1 response"
    assert page.locator(".row .row-more").first.inner_text() == "advantage of the response -0.71"
