"""What benchmarks/gpu.sh starts runs on a machine that has the core's packages and none of the page's."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = (ROOT / "benchmarks" / "gpu.sh").read_text()
TESTS = set(re.findall(r"tests/test_\w+\.py", SCRIPT))
BENCHMARKS = {f"benchmarks/{name}.py" for name in re.findall(r"-m benchmarks\.(\w+)", SCRIPT)}
INSTALLED = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "psutil", "pytest"}
INSTALLED |= {"hypothesis", "jinja2"}


def test_it_names_every_file_with_a_test_for_gpus_and_is_valid() -> None:
    marked = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        if re.search(
            r"^pytestmark = pytest\.mark\.gpu|^@pytest\.mark\.gpu|link_params\(\*LINKS", path.read_text(), re.M
        )
    }
    assert marked == TESTS
    assert {Path(name).stem for name in BENCHMARKS} == {"transfer", "reference_checkpoints", "decode"}
    subprocess.run(["bash", "-n", str(ROOT / "benchmarks" / "gpu.sh")], check=True)


def test_its_time_is_under_eight_minutes() -> None:
    assert sum(int(seconds) for seconds in re.findall(r"^run \w+ (\d+)", SCRIPT, re.M)) < 8 * 60


def test_nothing_that_it_starts_imports_what_is_not_there() -> None:
    seen, left = set(), {ROOT / name for name in TESTS | BENCHMARKS} | {ROOT / "tests" / "conftest.py"}
    while left:
        path = left.pop()
        seen.add(path)
        for name in imported(ast.parse(path.read_text()), path):
            first = name.partition(".")[0]
            own = file_of(name, path)
            if own is not None:
                left |= {own} - seen
            else:
                assert first in INSTALLED | sys.stdlib_module_names, f"{path} imports {name}"
    assert ROOT / "moepic_core" / "transfer" / "cuda.py" in seen


def imported(tree: ast.Module, path: Path) -> Iterator[str]:
    """Names of what is imported as soon as the file is, with what is taken from it; absolute in our own package."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def file_of(name: str, importer: Path) -> Path | None:
    """The file of ours that `name` or, for `module.thing`, its module is."""
    parts = name.split(".")
    for base in (ROOT, importer.parent):
        for length in (len(parts), len(parts) - 1):
            path = base.joinpath(*parts[:length]).with_suffix(".py")
            if length and path.is_file():
                return path
    return None
