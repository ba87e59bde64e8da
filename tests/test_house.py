"""Rules of the code: imports only go down, functions are short, public names have docstrings, no machine paths."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "vineppo"

# The folders and top-level modules, lowest first. A folder imports only from itself and from the rows below it. Folders
# of one row do not import each other.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"types", "seeds", "sentences"}),
    frozenset({"objects"}),
    frozenset({"steps", "statistics", "conformance"}),
    frozenset({"config"}),
    frozenset({"run"}),
    frozenset({"tasks"}),
    frozenset({"model"}),
    frozenset({"learning"}),
    frozenset({"sampling"}),
    frozenset({"values"}),
    frozenset({"credit"}),
    frozenset({"training"}),
    frozenset({"plan", "compare", "view"}),
    frozenset({"measure"}),
    frozenset({"cli", "trl"}),
    frozenset({"__main__", "__init__"}),
)
MAX_FUNCTION_LINES = 60

FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """Return the name in FLOORS: `seeds` for seeds.py, `credit` for credit/ppo.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_units(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield (line, unit) of every import from vineppo, also inside functions.

    `from vineppo import x` yields the unit x if there is one, or else `__init__`.

    Args:
        package: the package of the module, to resolve relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            dotted = [f"{module}.{alias.name}" for alias in node.names] if module == "vineppo" else [module]
        else:
            continue
        for name in dotted:
            parts = name.split(".")
            if parts[0] != "vineppo":
                continue
            unit = parts[1] if len(parts) > 1 else "__init__"
            known = unit in FLOOR_OF or (PACKAGE / unit).is_dir() or (PACKAGE / f"{unit}.py").is_file()
            yield node.lineno, unit if known else "__init__"


def refusal(importer: str, imported: str) -> str | None:
    """Return why `importer` must not import `imported`, or None if it may."""
    for name in (importer, imported):
        if name not in FLOOR_OF:
            return f"{name} has no floor; give it one in FLOORS"
    if importer == imported:
        return None
    above, below = FLOOR_OF[importer], FLOOR_OF[imported]
    if below < above:
        return None
    kind = "its neighbour" if below == above else "the higher floor"
    return f"{importer} (floor {above}) imports {kind} {imported} (floor {below})"


def test_imports_only_go_down() -> None:
    offenders = []
    for path in source_files():
        package = ("vineppo", *path.relative_to(PACKAGE).parts[:-1])
        for line, unit in imported_units(ast.parse(path.read_text()), package):
            reason = refusal(unit_of(path), unit)
            if reason:
                offenders.append(f"{path.relative_to(ROOT)}:{line}: {reason}")
    assert not offenders, "imports that do not go down:\n" + "\n".join(offenders)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("training", "credit", True),
        ("credit", "training", False),
        ("learning", "sampling", False),
        ("credit", "credit", True),
        ("cli", "compare", True),
        ("plan", "compare", False),
        ("cli", "trl", False),
        ("learning", "seeds", True),
        ("config", "types", True),
        ("types", "config", False),
        ("types", "seeds", False),
        ("credit", "__init__", False),
        ("model", "unheard_of", False),
    ],
)
def test_a_unit_may_import_itself_and_lower_floors(importer: str, imported: str, allowed: bool) -> None:
    assert (refusal(importer, imported) is None) is allowed


def test_every_form_of_import_is_found() -> None:
    source = """
import vineppo
import vineppo.learning.losses as losses
from vineppo.credit.vineppo import VINEPPO
from vineppo.model import policy
from vineppo import version
from . import group
from ..values import estimate
def inner():
    from vineppo.training.loop import train
import numpy
"""
    units = [unit for _, unit in imported_units(ast.parse(source), ("vineppo", "credit"))]
    assert sorted(units) == ["__init__", "__init__", "credit", "credit", "learning", "model", "training", "values"]


def functions(tree: ast.AST) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(tree) if isinstance(node, FunctionNode))


def test_functions_are_short() -> None:
    offenders = []
    for path in source_files():
        for node in functions(ast.parse(path.read_text())):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines")
    assert not offenders, f"functions of more than {MAX_FUNCTION_LINES} lines:\n" + "\n".join(offenders)


def public_without_docstring(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[int, str]]:
    """Yield (line, name) of public functions, classes and methods without a docstring, except nested functions."""
    for node in body:
        if not isinstance(node, ast.ClassDef | FunctionNode) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield node.lineno, prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from public_without_docstring(node.body, f"{prefix}{node.name}.")


def test_public_names_have_docstrings() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in source_files()
        for line, name in public_without_docstring(ast.parse(path.read_text()).body)
    ]
    assert not offenders, "public functions and classes without a docstring:\n" + "\n".join(offenders)


# Joined from pieces, so that the pattern does not match this file.
MACHINE_PATH = re.compile(
    r"(?<![\w.~/-])/(?:" + "|".join(["ho" + "me", "ro" + "ot", "wo" + "rk", "Us" + "ers"]) + r")/\w"
)
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".json", ".toml", ".txt", ".csv", ".cfg"}
TEXT_NAMES = {"Makefile", "run", ".gitignore"}


def text_files() -> Iterator[Path]:
    """Yield the text files in the project's folders and in its root directory."""
    folders = [ROOT / name for name in ("src", "tests", "docs", "dev", ".ci")]
    inside = (path for folder in folders for path in folder.rglob("*"))
    for path in sorted([*inside, *ROOT.iterdir()]):
        if path.is_file() and (path.suffix in TEXT_SUFFIXES or path.name in TEXT_NAMES):
            yield path


def test_no_file_contains_an_absolute_path_of_a_machine() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not offenders, "absolute paths of one machine:\n" + "\n".join(offenders)


def test_the_pattern_of_machine_paths() -> None:
    assert MACHINE_PATH.search('out = "' + "/ho" + 'me/someone/runs"')
    assert MACHINE_PATH.search("/wo" + "rk/main")
    assert not MACHINE_PATH.search("see docs" + "/ho" + "me/page and ~/wo" + "rk/x")


def test_prompts_of_problems_are_encoded_with_their_chat_template() -> None:
    """`Codec.prompt_ids(problem)` is right for every problem, `encode_prompt(problem.prompt)` only for plain text."""
    offenders = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in source_files()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if "encode_prompt(" in line and path.name != "codec.py"
    ]
    assert not offenders, "encode_prompt; use Codec.prompt_ids(problem):\n" + "\n".join(offenders)


ALGORITHM_NAMES = {"ppo", "grpo", "rloo", "reinforce"}  # not "vineppo", which is also the name of the package


def test_only_credit_and_trl_contain_the_names_of_algorithms() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}"
        for path in source_files()
        if path.relative_to(PACKAGE).parts[0] not in ("credit", "trl")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in ALGORITHM_NAMES
    ]
    assert not offenders, "names of algorithms; ask the Algorithm for what you need:\n" + "\n".join(offenders)


def test_the_folders_of_tests_are_those_of_the_package() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    tested = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").is_file()}
    assert tested == folders


def test_few_modules_are_at_the_top_of_the_package() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_the_settings_of_algorithms_do_not_import_pytorch() -> None:
    """`vineppo --help` and a user's mistake are answered without loading PyTorch."""
    code = "import sys; import vineppo.cli.main; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "src")}).returncode
        == 0
    )
