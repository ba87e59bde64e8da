"""Loading objects of user code by `module:object`, and the one-line messages if that fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vineppo.objects import first_line, load_object, message_line
from vineppo.types import UserError


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    return tmp_path


def test_objects_of_a_module_in_the_current_directory_are_loaded(working_directory: Path) -> None:
    (working_directory / "my_objects.py").write_text(
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


def test_the_current_directory_is_searched_first(working_directory: Path) -> None:
    (working_directory / "later").mkdir()
    (working_directory / "later" / "my_twice.py").write_text("where = 'later'\n")
    (working_directory / "my_twice.py").write_text("where = 'current'\n")
    sys.path.insert(0, str(working_directory / "later"))
    assert load_object("my_twice:where", "splitter") == "current"


@pytest.mark.parametrize("spec", ["", "mine", "mine:", ":mine", "a:b:c", ":"])
def test_a_malformed_name_raises(spec: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"unknown splitter {spec!r}; allowed: module:object, for example")):
        load_object(spec, "splitter")


def test_empty_missing_and_failing_modules_raise(working_directory: Path) -> None:
    (working_directory / "my_empty.py").write_text("")
    (working_directory / "my_broken.py").write_text("import surely_not_there\n")
    (working_directory / "my_exit.py").write_text("raise SystemExit('bye\\nbye')\n")
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


def test_main_refers_to_the_running_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from vineppo.objects import load_object\nmine = 5\nprint(load_object('__main__:mine', 'algorithm'))\n"
    )
    source = str(Path(__file__).parents[1] / "src")
    done = subprocess.run([sys.executable, str(script)], env={"PYTHONPATH": source}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("5\n", 0), done.stderr


def test_the_message_of_an_exception() -> None:
    assert message_line(ValueError("\n first\nsecond")) == "first"
    # peft raises this without a message for layers that it cannot merge.
    assert message_line(NotImplementedError()) == "NotImplementedError"


def test_first_line_of_an_exception() -> None:
    assert first_line(ValueError("\n first\nsecond")) == "ValueError: first"
    assert first_line(KeyError()) == "KeyError"
