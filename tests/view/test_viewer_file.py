"""The file of the credit viewer, its server and its command, without a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import itertools
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.view.rows import row, run_with
from vineppo.cli.main import main
from vineppo.run.records import write_parquet
from vineppo.types import UserError
from vineppo.view.page import SCRIPTS, asset, contents_of, html, write_page
from vineppo.view.serve import RunServer


def run_of(path: Path, iterations: int = 3, lines: int = 3) -> Path:
    for iteration in range(1, iterations + 1):
        texts = [f"step {i} of {iteration}\n" for i in range(lines)]
        values = [0.5] * lines
        run_with(path, row(texts, 1.0, values), row(texts, 0.0, values), iteration=iteration)
    return path


def data_of(text: str) -> dict[str, Any]:
    """Return the data in a page: name of the part -> JSON."""
    found = re.findall(r'<script type="text/plain" id="chunk/([^"]+)">([A-Za-z0-9+/=]+)</script>', text)
    return {name: json.loads(gzip.decompress(base64.b64decode(chunk))) for name, chunk in found}


def test_the_file_contains_the_run(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    contents = write_page(out, [run_of(tmp_path / "run")])
    text = out.read_text()
    data = data_of(text)
    assert sorted(data) == sorted(["0/rows", *(f"0/{i}/{p}" for i in (1, 2, 3) for p in ("core", "more", "tokens"))])
    assert [block["iteration"] for block in data["0/rows"]] == [1, 2, 3]
    assert contents.meta["left_out"] == []
    meta = re.search(r'id="meta">(.*?)</script>', text)
    assert meta and json.loads(meta[1]) == contents.meta
    assert write_page(tmp_path / "again.html", [tmp_path / "run"]).chunks == contents.chunks  # equal data, equal bytes


def test_the_policy_allows_this_style_and_this_script_only(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    write_page(out, [run_of(tmp_path / "run")])
    text = out.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    style, script = (
        re.search(r"<style>(.*?)</style>", text, re.S),
        re.search(r'type="module">(.*?)</script>', text, re.S),
    )
    assert policy and style and script

    def digest(part: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() + "'"

    assert policy[1].split("; ") == [
        "default-src 'none'", f"script-src {digest(script[1])}", f"style-src {digest(style[1])}", "connect-src 'none'",
        "img-src data:", "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip
    assert len(re.findall(r"<script", text)) == len(re.findall(r"</script>", text))


def test_the_file_names_no_address(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    write_page(out, [run_of(tmp_path / "run")])
    text = re.sub(r'id="chunk/[^"]+">[^<]*', "", out.read_text())  # base64 may contain two slashes
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|\bsrc=|<link(?! rel=\"icon\" href=\"data:,\">)",
        re.sub(r"^\s*//.*$|\s// .*$", "", text, flags=re.M),
    )


def test_the_script_puts_text_on_the_page_as_text() -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|createContextualFragment"
    for name in SCRIPTS:
        assert not re.search(forbidden + r"|setHTML|DOMParser|\.srcdoc|javascript:", asset(name)), name
    assert not re.search(r"\bon[a-z]+=|style=", asset("page.html"))


def test_names_of_runs_are_text_only(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a<b>&'\u2028 --><script>x")
    text = html(contents_of([run]).meta, {})
    assert "<title>a&lt;b&gt;&amp;'\ufffd --&gt;&lt;script&gt;x - vineppo</title>" in text
    assert text.count("<script") == 2 and "\u2028" not in text


def test_what_a_model_wrote_is_compressed_data(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", row(["</script><script>alert(1)</script>\u2028"], 1.0, [0.5]))
    out = tmp_path / "page.html"
    write_page(out, [run])
    assert "alert" not in out.read_text()
    assert data_of(out.read_text())["0/1/core"]["texts"][:3] == ["<", "/", "s"]


def test_a_page_that_would_be_too_large_leaves_details_out(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", iterations=9, lines=40)
    everything = contents_of([run])
    whole = len(html(everything.meta, everything.chunks).encode())
    tokens = sum(len(text) for name, text in everything.chunks.items() if name.endswith("/tokens"))
    kept: dict[str, list[int]] = {}
    limit = whole + 2000 - tokens // 2  # 2000 bytes are reserved for what the page says about the rest
    contents = contents_of([run], limit)
    assert len(html(contents.meta, contents.chunks).encode()) <= limit
    for part in ("core", "more", "tokens"):
        kept[part] = [i for i in range(1, 10) if f"0/{i}/{part}" in contents.chunks]
    assert kept["core"] == list(range(1, 10)) and 0 < len(kept["tokens"]) < 9
    missing = sorted(set(range(1, 10)) - set(kept["tokens"]))
    assert contents.meta["left_out"][-1].startswith("probabilities and entropies of tokens of iterations ")
    numbers = [int(n) for n in re.findall(r"\d+", contents.meta["left_out"][-1])]
    assert set(numbers) <= set(missing) and 9 in kept["tokens"]
    assert [b["iteration"] for b in data_of(html(contents.meta, contents.chunks))["0/rows"]] == list(range(1, 10))
    with pytest.raises(
        UserError, match=r"script and the lists of all responses, and --max_mb allows 0\.01; allow more"
    ):
        contents_of([run], 10_000)


def test_a_damaged_iteration_is_left_out_and_named(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    (run / "rollouts" / "000002.parquet").write_bytes(b"PAR1")
    contents = contents_of([run])
    assert contents.meta["runs"][0]["iterations"] == [1, 3] and "0/2/core" not in contents.chunks
    assert len(contents.meta["left_out"]) == 1 and "000002.parquet is damaged" in contents.meta["left_out"][0]
    for iteration in (1, 3):
        (run / "rollouts" / f"00000{iteration}.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="has no iteration that can be read"):
        contents_of([run])


def themes() -> dict[str, dict[str, str]]:
    """Return the colours of both schemes by name, from the style."""
    style = asset("style.css")
    light, dark, system = re.findall(r":root[^{]*\{(.*?)\}", style, re.S)[:3]
    assert dict(re.findall(r"--(\w[\w-]*): (#\w{6})", dark)) == dict(re.findall(r"--(\w[\w-]*): (#\w{6})", system))
    return {
        name: dict(re.findall(r"--(\w[\w-]*): (#\w{6})", text)) for name, text in (("light", light), ("dark", dark))
    }


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour #RRGGBB, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


SCALE = [f"{sign}{n}" for sign in "pn" for n in range(1, 6)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa(theme: str) -> None:
    colours = themes()[theme]
    texts = [("ink", name) for name in ("bg", "panel", "hover", "on", *SCALE)]
    texts += [(name, ground) for name in ("muted", "accent") for ground in ("bg", "panel", "hover", "on")]
    texts += [(name, ground) for name in ("right", "wrong", "warn") for ground in ("panel", "hover", "on")]
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in texts}
    assert not {pair: round(ratio, 2) for pair, ratio in low.items() if ratio < 4.5}
    shapes = [(name, "panel") for name in ("up", "down", "mark", "accent")]  # lines, bars and frames of fields
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in shapes}
    assert not {pair: round(ratio, 2) for pair, ratio in low.items() if ratio < 3}


def seen_without(colour: str, kind: str) -> tuple[float, ...]:
    """Return a colour in linear RGB as people without red or green receptors see it (Vienot, Brettel & Mollon 1999)."""
    linear = [((int(colour[i : i + 2], 16) / 255 + 0.055) / 1.055) ** 2.4 for i in (1, 3, 5)]
    r, g, b = linear
    if kind == "red":
        return (0.1121 * r + 0.8853 * g, 0.1127 * r + 0.8897 * g, 0.0045 * r + b)
    return (0.292 * r + 0.7054 * g, 0.2934 * r + 0.7089 * g, -0.0209 * r + 0.0256 * g + b)


@pytest.mark.parametrize("kind", ["red", "green"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_sides_of_the_scale_differ_without_red_or_green(theme: str, kind: str) -> None:
    """From the second colour on, one side stays bluer than grey and the other one yellower."""
    colours = themes()[theme]
    for n in range(2, 6):
        r, _, b = seen_without(colours[f"p{n}"], kind)
        assert b > 1.2 * r, f"p{n}"
        r, _, b = seen_without(colours[f"n{n}"], kind)
        assert r > 1.2 * b, f"n{n}"


@pytest.mark.parametrize(("theme", "side"), itertools.product(["light", "dark"], "pn"))
def test_larger_advantages_are_further_from_the_ground(theme: str, side: str) -> None:
    colours = themes()[theme]
    steps = [contrast(colours[f"{side}{n}"], colours["panel"]) for n in range(1, 6)]
    assert steps == sorted(steps) and all(b > a * 1.04 for a, b in itertools.pairwise(steps))


@contextmanager
def served(*runs: Path) -> Iterator[RunServer]:
    with RunServer(runs, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def answer(server: RunServer, path: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes, Any]:
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body, response.headers


def test_the_server_follows_a_run(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", iterations=1)
    with served(run) as server:
        assert server.server_address[0] == "127.0.0.1"
        status, body, headers = answer(server, "/")
        assert status == 200 and b"connect-src 'self'" in body and b'"live":true' in body
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        assert json.loads(answer(server, "/meta")[1])["runs"][0]["iterations"] == [1]
        before = json.loads(gzip.decompress(answer(server, "/data/0/rows")[1]))
        assert [block["iteration"] for block in before] == [1]
        run_with(run, row(["new\n"], 0.0, [0.25]), iteration=2)
        meta = json.loads(answer(server, "/meta")[1])["runs"][0]
        assert meta["iterations"] == [1, 2] and len(meta["stamps"]) == 2 and meta["finished"] is False
        after = json.loads(gzip.decompress(answer(server, "/data/0/rows")[1]))
        assert [block["iteration"] for block in after] == [1, 2] and after[1]["reward"] == [0]
        core = json.loads(gzip.decompress(answer(server, "/data/0/2/core")[1]))
        assert core["responses"][0]["s"]["v"] == [0.25]


def test_a_file_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", iterations=1)
    with served(run) as server:
        answer(server, "/data/0/rows")
        path = run / "rollouts" / "000001.parquet"
        write_parquet(path, [row(["x"], 0.25, [0.5])])
        os.utime(path, (1, 1))  # another time than before, whatever the resolution of the clock
        assert json.loads(gzip.decompress(answer(server, "/data/0/rows")[1]))[0]["reward"] == [0.25]


def test_the_server_answers_only_its_own_address(tmp_path: Path) -> None:
    with served(run_of(tmp_path / "run", iterations=1)) as server:
        port = server.server_address[1]
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1:{port + 1}", "127.0.0.1"):
            status, body, _ = answer(server, "/data/0/1/core", host)
            assert status == 403 and b"own address" in body
        assert answer(server, "/", f"localhost:{port}")[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/data/1/rows", "/data/0/9/core", "/data/0/1/other", "/../etc/passwd", "/data/0/1/core/", "/data/0/-1/core"],
)
def test_other_paths_do_not_exist(tmp_path: Path, path: str) -> None:
    with served(run_of(tmp_path / "run", iterations=1)) as server:
        assert answer(server, path)[0] == 404
        assert answer(server, "/", method="POST")[0] == 501


def test_the_command_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run_of(tmp_path / "a"), run_of(tmp_path / "b")
    assert main(["view", str(first)]) == 0
    assert capsys.readouterr().out.startswith(f"{first / 'view.html'} (0.")
    out = tmp_path / "new" / "both.html"
    assert main(["view", str(first), "--compare", str(second), "--out", str(out)]) == 0
    assert {"0/rows", "1/rows", "1/3/core"} <= set(data_of(out.read_text()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no RUN is given"),
        (["{run}", "--serve", "--out", "x.html"], "--out is for a file, and --serve writes none"),
        (["{run}", "--port", "1"], "--port is for --serve"),
        (["{run}", "--serve", "--port", "x"], "--port is 'x'; it must be a whole number"),
        (["{run}", "--serve", "--port", "99999"], "port 99999 cannot be used"),
        (["{run}", "--max_mb", "none"], "--max_mb is 'none'; it must be a number above 0"),
        (["{run}", "--max_mb", "0.001"], "allow more"),
        (["{run}", "--out", "{run}"], "which is a directory; give the name of a file"),
        (["{run}", "--out", "{run}/config.yaml/x.html"], "cannot be written"),
        (["{run}", "--compare", "{run}/no"], "no run directory at"),
        (["{run}/no"], "no run directory at"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run = run_of(tmp_path / "run", iterations=1)
    assert main(["view", *(argument.format(run=run) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
