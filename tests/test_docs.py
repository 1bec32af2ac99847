"""The docs say what the code does: generated pages are current, settings are documented, nothing local is named."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
from test_layers import LAYERS

from moepic_core.spec import STRATEGIES, Settings

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate_docs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate_docs)


@pytest.mark.parametrize("name", generate_docs.PAGES)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == generate_docs.PAGES[name](), "run: python docs/generate.py"


def test_every_setting_and_strategy_is_documented() -> None:
    page = (ROOT / "docs" / "COMMAND_LINE.md").read_text()
    for field in dataclasses.fields(Settings):
        assert field.name in ("checkpoint",) or f"--{field.name.replace('_', '-')}" in page, field.name
    readme = (ROOT / "README.md").read_text()
    for strategy in STRATEGIES:
        assert f"`{strategy}`" in readme, strategy


def test_the_architecture_page_names_every_file() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    for modules in LAYERS.values():
        for module in modules.split():
            name = f"{module.split('.')[0]}/" if "." in module else module
            assert f"`{name}`" in page or f"`{name}*`" in page, module


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
