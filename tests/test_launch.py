"""launch.py: what it refuses and in which words, which port it takes, when it installs. Installs nothing itself."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import launch

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--port", "many"], "invalid int value: 'many'"),
        (["--port", "70000"], "--port 70000 is out of range; allowed is 1 to 65535"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 opens the page to other machines; add --auth user:password"),
        (["--auth", "user"], "written user:password"),
        (["--auth", "user:"], "written user:password"),
        (["--auth", ":password"], "written user:password"),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "set_up", lambda requirements: pytest.fail("nothing may be installed for a mistake"))
    assert launch.main(arguments) == 2
    output = capsys.readouterr()
    assert words in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_help_names_every_option_and_the_test_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        launch.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "checkpoint",
        "vram",
        "device",
        "link",
        "strategy",
        "host",
        "port",
        "auth",
        "no-browser",
        "no-setup",
    ):
        assert f"--{option}" in text
    assert "launch.py test" in text


def test_options_arrive_as_given() -> None:
    options = launch.parse(["--host", "0.0.0.0", "--auth", "ann:a:b", "--vram", "2GB", "--port", "8000"])
    assert (options.host, options.auth, options.vram, options.port) == ("0.0.0.0", ("ann", "a:b"), "2GB", 8000)
    assert launch.parse([]).checkpoint is None


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.7", False), ("example.org", False)],
)  # fmt: skip
def test_is_loopback(host: str, own: bool) -> None:
    assert launch.is_loopback(host) is own


def test_old_pythons_are_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.python_problem((3, 11)) is None
    assert launch.python_problem((4, 0)) is None
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    assert launch.main([]) == 2
    assert "needs Python 3.11 or newer and this is 3.9" in capsys.readouterr().err
    ast.parse((ROOT / "launch.py").read_text(), feature_version=(3, 7))


def test_only_the_standard_library_is_imported_before_the_environment_exists() -> None:
    tree = ast.parse((ROOT / "launch.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names} == {"app.main"}
    assert not any("app.main" in ast.unparse(node) for node in tree.body if not isinstance(node, ast.FunctionDef))


@contextlib.contextmanager
def listening() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_the_next_free_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as port:
        monkeypatch.setattr(launch, "FIRST_PORT", port)
        assert launch.choose_port("127.0.0.1", None) > port
        with pytest.raises(launch.LaunchError, match=f"port {port} is taken; choose another one"):
            launch.choose_port("127.0.0.1", port)
        monkeypatch.setattr(launch, "NUM_PORTS", 1)
        with pytest.raises(launch.LaunchError, match="all taken; give a free one with --port"):
            launch.choose_port("127.0.0.1", None)
    assert launch.choose_port("127.0.0.1", port) == port


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_a_host_that_is_not_ours(host: str) -> None:
    with pytest.raises(launch.LaunchError, match=f"--host {host} is not an address of this machine"):
        launch.choose_port(host, None)


class Pip:
    """Stands in for the commands that set up: notes them, and ends as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.commands: list[list[str]] = []
        self.ending: int | BaseException = 0
        self.requirements = folder / "requirements.txt"
        self.requirements.write_text("torch==1\n")
        self.more = folder / "requirements-test.txt"
        self.more.write_text("pytest==1\n")
        monkeypatch.setattr(launch, "ENVIRONMENT", folder / ".venv")
        monkeypatch.setattr(launch, "environment_works", (folder / ".venv").is_dir)
        monkeypatch.setattr(subprocess, "call", self.call)

    def call(self, command: list[str], **options: object) -> int:
        self.commands.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir()
            return 0
        if isinstance(self.ending, BaseException):
            raise self.ending
        return self.ending


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pip:
    return Pip(monkeypatch, tmp_path)


def test_a_second_start_installs_nothing(pip: Pip) -> None:
    launch.set_up([pip.requirements])
    environment, install = pip.commands
    assert environment[1:3] == ["-m", "venv"]
    assert install[1:4] == ["-m", "pip", "install"]
    assert install[-2:] == ["-r", str(pip.requirements)]
    launch.set_up([pip.requirements])
    assert len(pip.commands) == 2
    launch.set_up([pip.requirements, pip.more])
    assert pip.commands[2][-2:] == ["-r", str(pip.more)]
    assert str(pip.requirements) not in pip.commands[2]


def test_changed_pins_or_another_python_install_again(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    launch.set_up([pip.requirements])
    pip.requirements.write_text("torch==2\n")
    launch.set_up([pip.requirements])
    assert len(pip.commands) == 3
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    launch.set_up([pip.requirements])
    assert len(pip.commands) == 4


@pytest.mark.parametrize("ending", [1, KeyboardInterrupt()])
def test_an_installation_that_did_not_finish_is_resumed(pip: Pip, ending: int | BaseException) -> None:
    pip.ending = ending
    with pytest.raises((launch.LaunchError, KeyboardInterrupt)):
        launch.set_up([pip.requirements])
    assert not launch.is_installed(pip.requirements)
    pip.ending = 0
    launch.set_up([pip.requirements])
    assert launch.is_installed(pip.requirements)
    assert [command[2] for command in pip.commands] == ["venv", "pip", "pip"]


def test_an_environment_that_lacks_pip_or_python_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "ENVIRONMENT", tmp_path)
    assert not launch.environment_works()
    python = launch.environment_python()
    python.parent.mkdir()
    for answer, works in ((f"{sys.version_info[0]}.{sys.version_info[1]}", True), ("3.1", False), ("", False)):
        python.write_text(f"#!/bin/sh\necho {answer}\n")
        python.chmod(0o755)
        assert launch.environment_works() is works


def test_a_missing_venv_module_names_its_package(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    with pytest.raises(launch.LaunchError) as refusal:
        launch.set_up([pip.requirements])
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    assert str(refusal.value).endswith(f"install it with: sudo apt install python3-venv (or {package})")
    assert pip.commands == []


def test_the_test_command_runs_every_check_and_keeps_the_first_failure(
    pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "set_up", lambda requirements: None)
    codes = {"ruff": 0, "mypy": 3, "pytest": 1}
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: pip.commands.append(command) or codes[command[2]])
    assert launch.main(["test", "-k", "planner"]) == 3
    assert [command[2:] for command in pip.commands] == [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["pytest", "-rs", *launch.SIDE_BY_SIDE, "-k", "planner"],
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "/no/such/folder"], "neither a folder nor a hub id"),
        (["--link", "pigeon"], "link 'pigeon' is unknown"),
        (["--strategy", "moepik"], "did you mean 'moepic'?"),
        (["--vram", "2 parsecs"], "size '2 parsecs' is not understood"),
    ],
)
def test_a_mistake_about_the_model_ends_the_start(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOEPIC_HOME", str(tmp_path))
    assert launch.main(["--no-setup", "--no-browser", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_it_starts_from_any_folder(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert run.returncode == 0, run.stderr
