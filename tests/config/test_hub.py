"""Questions to the Hugging Face Hub: one short request instead of a minute of retries (case 21)."""

from __future__ import annotations

from pathlib import Path

import pytest

from vineppo.config import hub
from vineppo.types import UserError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache of downloads and no remembered answers. Return the folder of the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setattr(hub, "_answers", {})
    return tmp_path


def test_a_refused_connection_means_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the port `discard`
    with pytest.raises(UserError, match="'org/none' does not exist here, and the Hugging Face Hub cannot be reached"):
        hub.needs_local_copy("model.path 'org/none'", "org/none", "model", "check the path")


def test_a_copy_is_used_if_the_hub_cannot_be_reached(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_ask", lambda name, kind: "unreachable")
    (empty_cache / "models--org--name").mkdir()
    (empty_cache / "datasets" / "org___name").mkdir(parents=True)
    assert hub.needs_local_copy("x", "org/name", "model", "") is True
    assert hub.needs_local_copy("x", "org/name", "dataset", "") is True
    with pytest.raises(UserError, match="cannot be reached"):
        hub.needs_local_copy("x", "org/other", "dataset", "")


def test_an_absent_name_is_told_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(name: str, kind: str) -> str:
        asked.append(name)
        return "absent"

    monkeypatch.setattr(hub, "_ask", ask)
    for _ in range(2):
        with pytest.raises(UserError, match="the Hugging Face Hub has no model org/none that is public"):
            hub.needs_local_copy("model.path 'org/none'", "org/none", "model", "check the name")
    assert asked == ["org/none"]


@pytest.mark.parametrize(
    ("name", "valid"),
    [("gpt2", True), ("org/name-1.5_b", True), ("a/b/c", False), ("two words", False), ("a..b", False), ("/a", False)],
)
def test_names_of_repositories(name: str, valid: bool) -> None:
    assert hub.is_repository_name(name) is valid
