"""What all tests share: no network, no home directory, tiny checkpoints and pages on demand, no GPU needed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from pages import Pages
    from playwright.sync_api import Browser

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; read by torch when it is first imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as launch.py and the command line do
# Read by huggingface_hub when it is first imported; tests that need a cache or a hub make their own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.path.join(tempfile.gettempdir(), "moepic-tests-have-no-hub-cache")


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What outlives a session is kept in a folder of each test's own."""
    monkeypatch.setenv("MOEPIC_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session", autouse=True)
def quick_measurements() -> Iterator[None]:
    """Measuring a machine takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moepic_core.calibration._SECONDS", 0.02)
        patch.setattr("moepic_core.link_probe._SECONDS", 0.01)
        yield


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all browser tests of a worker: starting one takes seconds."""
    from pages import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(browser: Browser) -> Iterator[Pages]:
    """Opens watched pages."""
    from pages import Pages

    pages = Pages(browser)
    yield pages
    pages.close()


@pytest.fixture(autouse=True)
def no_complaints(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test of the page, nothing is on its console that should not be."""
    pages: Pages | None = request.getfixturevalue("pages") if "pages" in request.fixturenames else None
    yield
    if pages is not None:
        pages.check()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoints("mixtral", torch.bfloat16)`: the folder of a tiny checkpoint, made once per session. Read only."""
    import tiny_checkpoints
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def checkpoint(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in folders:
            folder = tmp_path_factory.mktemp(family)
            folders[family, dtype] = tiny_checkpoints.make(family, folder, dtype)
        return folders[family, dtype]

    return checkpoint


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="no CUDA device"))
