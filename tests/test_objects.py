"""Objects of the user's code by `module:object`: what is found, and one line for everything that is not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vineppo.objects import first_line, load_object
from vineppo.types import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    return tmp_path


def test_any_object_of_a_module_in_the_current_directory(here: Path) -> None:
    (here / "my_objects.py").write_text(
        "from __future__ import annotations\nimport re\nfrom typing import Any\nmine = {1: 2}\n"
    )
    assert load_object("my_objects:mine", "algorithm") == {1: 2}
    assert load_object("my_objects:__name__", "algorithm") == "my_objects"
    with pytest.raises(UserError, match=re.escape("has no 'mein'; did you mean 'mine'?")):
        load_object("my_objects:mein", "algorithm")
    with pytest.raises(UserError) as refused:
        load_object("my_objects:xyz", "algorithm")
    message = "algorithm 'my_objects:xyz': module 'my_objects' has no 'xyz'; it has: mine"
    assert str(refused.value) == message


def test_the_current_directory_is_first(here: Path) -> None:
    (here / "later").mkdir()
    (here / "later" / "my_twice.py").write_text("where = 'later'\n")
    (here / "my_twice.py").write_text("where = 'here'\n")
    sys.path.insert(0, str(here / "later"))
    assert load_object("my_twice:where", "splitter") == "here"


@pytest.mark.parametrize("spec", ["", "mine", "mine:", ":mine", "a:b:c", ":"])
def test_another_form_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"no splitter {spec!r}; allowed: module:object, for example")):
        load_object(spec, "splitter")


def test_a_module_without_objects_and_one_that_fails(here: Path) -> None:
    (here / "my_empty.py").write_text("")
    (here / "my_broken.py").write_text("import surely_not_there\n")
    (here / "my_exit.py").write_text("raise SystemExit('bye\\nbye')\n")
    refusals = {
        "my_empty:x": "splitter 'my_empty:x': module 'my_empty' has no 'x'; it has: nothing",
        "absent.deep:x": "no module 'absent' in the current directory or among the installed packages",
        "my_broken:x": "importing 'my_broken' failed: ModuleNotFoundError: No module named 'surely_not_there'",
        "my_exit:x": "splitter 'my_exit:x': importing 'my_exit' failed: SystemExit: bye",
    }
    for spec, message in refusals.items():
        with pytest.raises(UserError) as refused:
            load_object(spec, "splitter")
        assert str(refused.value).endswith(message)


def test_main_is_the_running_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from vineppo.objects import load_object\nmine = 5\nprint(load_object('__main__:mine', 'algorithm'))\n"
    )
    source = str(Path(__file__).parents[1] / "src")
    done = subprocess.run([sys.executable, str(script)], env={"PYTHONPATH": source}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("5\n", 0), done.stderr


def test_an_error_is_one_line() -> None:
    assert first_line(ValueError("\n first\nsecond")) == "ValueError: first"
    assert first_line(KeyError()) == "KeyError"
