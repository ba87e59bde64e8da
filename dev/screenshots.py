"""Make the pictures of the credit viewer in docs/images.

    python dev/screenshots.py                   # trains two short runs first (about two minutes)
    python dev/screenshots.py runs/a runs/b     # shows existing runs: of vineppo, of another algorithm

It needs Debian's program chromium and the package playwright (the extra `real`). Each picture has less than 200 kB.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from vineppo.cli.common import training_config
from vineppo.training.loop import train
from vineppo.view.page import write_page
from vineppo.view.records import iterations_of, responses_of
from vineppo.view.response import Response

OUT = Path(__file__).resolve().parents[1] / "docs" / "images"
MAX_BYTES = 200_000
RECIPE = "wording"


def short_run(path: Path, algorithm: str) -> Path:
    """Train a short run, whose problems are those of the other run, and return its directory."""
    overrides = {
        "run.dir": str(path), "run.iterations": "8", "rollouts.num_problems": "8", "rollouts.group_size": "4",
        "learner.minibatch_size": "16", "eval.every": "0", "eval.final_num_problems": "0",
    }  # fmt: skip
    train(training_config(RECIPE, overrides, algorithm), recipe=RECIPE)
    return path


def most_telling(run: Path) -> Response:
    """Return a right response with saved continuations whose group has wrong ones, with the largest fall on the way."""
    best: tuple[float, Response] | None = None
    for iteration in iterations_of(run):
        responses = responses_of(run, iteration)
        for response in responses:
            group = {r.reward for r in responses if r.problem_id == response.problem_id}
            lowest = min((s.advantage for s in response.steps if s.advantage is not None), default=0.0)
            if response.continuations and len(group) > 1 and response.reward and (best is None or lowest < best[0]):
                best = (lowest, response)
    if best is None:
        raise SystemExit(f"{run} has no right response with continuations in a group with different rewards")
    return best[1]


def first_with_alternatives(run: Path) -> tuple[Response, int]:
    """Return the response with the most alternative tokens that has continuations, and the step of the first one."""
    found = [r for i in iterations_of(run) for r in responses_of(run, i) if r.alternatives and r.continuations]
    if not found:
        raise SystemExit(f"{run} has no response with alternatives and continuations")
    response = max(found, key=lambda r: len(r.alternatives))
    position = min(a.position for a in response.alternatives)
    return response, next(s.number for s in response.steps if s.start <= position < s.end)


def take(browser: Any, page_file: Path, fragment: str, name: str, size: tuple[int, int], scheme: str) -> None:
    """Open a page and save a picture of it."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{page_file.resolve().as_uri()}#{fragment}")
    page.locator("body[data-ready]").wait_for()
    page.wait_for_timeout(500)
    path = OUT / f"viewer-{name}.png"
    page.screenshot(path=path)
    with Image.open(path) as image:
        image.convert("RGB").save(path, optimize=True)
    context.close()
    if path.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes; the limit is {MAX_BYTES}")
    print(f"{path.relative_to(OUT.parents[1])} ({path.stat().st_size / 1000:.0f} kB)")


def main(arguments: list[str]) -> None:
    """Make the pictures of the runs given, or of two short runs."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        raise SystemExit("the program chromium is missing; install it with apt-get install chromium")
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        base = Path(folder)
        if arguments:
            first, second = map(Path, arguments)
        else:
            first, second = short_run(base / "vineppo", "vineppo"), short_run(base / "counterfactual", "counterfactual")
        write_page(base / "one.html", [first])
        write_page(base / "both.html", [first, second])
        telling, (other, step) = most_telling(first), first_with_alternatives(second)
        place, with_step = (
            f"r={telling.iteration}.{telling.number}",
            f"run=b&r={other.iteration}.{other.number}&step={step}",
        )
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        take(browser, base / "one.html", f"{place}&queue=drops", "why", (1280, 700), "light")
        take(browser, base / "one.html", f"{place}&tab=group", "group", (1280, 700), "dark")
        take(browser, base / "both.html", f"{with_step}&tab=branches", "branches", (1280, 700), "light")
        take(browser, base / "one.html", f"{place}&tab=credits", "phone", (390, 844), "light")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
