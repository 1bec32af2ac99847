"""Who may import whom, and who may name threads, files, clocks and printers. `LAYERS` is the single truth of the order.

`docs/ARCHITECTURE.md` repeats the table for people. Each module imports only modules that stand before it, so rows
depend on rows above and there is no cycle.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "moepic_core"

LAYERS = {
    "words": "errors units costs spec links events",
    "thought": "geometry routing eviction hit_curves eviction_choice activation_matrices predictor trace metrics "
    "telemetry guesses recordings cost_fit drift workload cost_model split_search allocation shares budgets uniform "
    "frontier planner needs simulated_link simulated_layer simulated_residency simulated_step simulator presets "
    "synthetic verdict ablation",
    "bytes": "folders safetensors_header shards model_config checkpoint lazy_tensors finder packing row_sums "
    "expert_math trace_file extras memory",
    "places": "transfer.base transfer.clocks transfer.ledger transfer.backend transfer.pinning transfer.thread "
    "transfer.emulated transfer.device_queue transfer.cuda "
    "arena host_store ram_store disk_store embedding_rows device_cache staging calibrate",
    "joint": "loads residency pieces step link_probe hf.embedding hf.linear hf.refusals hf.loading hf.model hf.text "
    "hf.experts hf.probe steering turn assembly",
    "whole": "governor passes replies engine measuring calibration comparison",
    "door": "commands.options commands.answers commands.inspect commands.generate commands.bench commands.plan "
    "commands.simulate cli __main__",
}
ORDER = [module for row in LAYERS.values() for module in row.split()]
PURE = [*LAYERS["words"].split(), *LAYERS["thought"].split()]

# Package → the only modules that import it ("hf." stands for all of that folder).
PRIVILEGES = {
    "transformers": ("hf.",),
    "tokenizers": ("hf.",),
    "huggingface_hub": ("finder",),
    "psutil": ("calibrate",),
    "ctypes": ("transfer.",),
    "threading": ("transfer.", "turn", "telemetry", "finder", "lazy_tensors"),  # all but transfers for one lock each
    "argparse": ("cli", "commands."),
    "concurrent": ("lazy_tensors", "ram_store"),  # two readers of one large tensor; one packer
    **dict.fromkeys(("asyncio", "multiprocessing", "queue", "subprocess", "socket"), ()),
    **dict.fromkeys(("app", "launch", "gradio", "plotly"), ()),
}
IMPURE = {"torch", "time", "datetime", "random", "os", "io", "pathlib", "shutil", "tempfile"}
STREAMS = {"Stream", "Event", "stream", "current_stream", "default_stream", "synchronize", "cudart"}

files = pytest.mark.parametrize("module", ORDER)


def path_of(module: str) -> Path:
    return CORE / f"{module.replace('.', '/')}.py"


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(path: Path, package: str) -> Iterator[str]:
    """Absolute names of everything that a file of `package` imports, with the names taken from it appended."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def imports_of(module: str) -> list[str]:
    return list(imported(path_of(module), f"moepic_core.{module}".rpartition(".")[0]))


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def test_the_table_lists_every_file_once() -> None:
    found = {".".join(path.relative_to(CORE).with_suffix("").parts) for path in CORE.rglob("*.py")}
    assert {name for name in found if not name.endswith("__init__")} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@files
def test_imports_only_what_stands_before_it(module: str) -> None:
    for name in imports_of(module):
        if name.startswith("moepic_core."):
            parts = name.split(".")[1:]
            wanted = next((target for target in (".".join(parts[:2]), parts[0]) if target in ORDER), None)
            assert wanted is not None, f"{module} imports {name}, which is no module of the table"
            assert ORDER.index(wanted) < ORDER.index(module), f"{module} imports {wanted}, which stands after it"


@files
def test_privileges(module: str) -> None:
    for name in imports_of(module):
        allowed = PRIVILEGES.get(name.split(".")[0])
        assert allowed is None or module.startswith(allowed), f"{module} imports {name}, allowed are {allowed}"


@files
def test_streams_and_prints(module: str) -> None:
    for node in ast.walk(tree_of(path_of(module))):
        if isinstance(node, ast.Attribute) and not module.startswith("transfer."):
            stream = dotted(node.value) == "torch.cuda" and node.attr in STREAMS
            assert not stream, f"{module}:{node.lineno} names torch.cuda.{node.attr}, which is for transfer alone"
        if isinstance(node, ast.Name | ast.Attribute) and not module.startswith(("cli", "commands.")):
            assert dotted(node) not in ("print", "sys.stdout", "sys.stderr"), f"{module}:{node.lineno} prints"


@pytest.mark.parametrize("module", PURE)
def test_words_and_thought_know_no_tensor_clock_or_file(module: str) -> None:
    named = {name.split(".")[0] for name in imports_of(module)}
    assert not named & IMPURE, f"{module} imports {named & IMPURE}"
    calls = {dotted(node.func) for node in ast.walk(tree_of(path_of(module))) if isinstance(node, ast.Call)}
    assert "open" not in calls, f"{module} opens a file"


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_a_module_only_defines(path: Path) -> None:
    """At the top of a file stand a docstring, imports, definitions and constants; packages import nothing."""
    definitions, imports = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign), (ast.Import, ast.ImportFrom)
    allowed = definitions if path.stem == "__init__" else definitions + imports
    docstring, *rest = tree_of(path).body
    assert isinstance(docstring, ast.Expr), f"{path} has no docstring"
    assert isinstance(docstring.value, ast.Constant), f"{path} has no docstring"
    for node in rest:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"), f"{path}:{node.lineno}"
        else:
            assert isinstance(node, allowed), f"{path}:{node.lineno}"


PAGE = [ROOT / "launch.py", *sorted((ROOT / "app").rglob("*.py"))]
KNOW_THE_ENGINE = [ROOT / "app" / name for name in ("state.py", "loader.py", "answering.py")]


@pytest.mark.parametrize("path", PAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_state_of_the_page_and_its_parts_know_the_engine(path: Path) -> None:
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    engine = [name for name in imported(path, package) if f"{name}.".startswith("moepic_core.engine.")]
    assert not engine or path in KNOW_THE_ENGINE, f"{path} imports {engine}"


def run(code: str, folder: Path) -> str:
    """What `code` prints in a fresh interpreter whose home and working folder are `folder`."""
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_words_and_thought_load_without_torch(tmp_path: Path) -> None:
    code = f"""
import importlib, sys
for module in {PURE}:
    importlib.import_module(f"moepic_core.{{module}}")
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    assert run(code, tmp_path) == "[]"


def test_nothing_happens_at_import(tmp_path: Path) -> None:
    code = f"""
import importlib, sys, threading
for module in {[name for name in ORDER if name != "__main__"]}:
    importlib.import_module(f"moepic_core.{{module}}")
import torch
from transformers.integrations.moe import ExpertsInterface
print(threading.active_count(), torch.cuda.is_initialized(), "moepic" in ExpertsInterface().valid_keys(),
      sorted({{"gradio", "plotly", "app"}} & set(sys.modules)))
"""
    assert run(code, tmp_path) == "1 False False []"
    assert list(tmp_path.iterdir()) == []
