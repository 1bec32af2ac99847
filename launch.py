#!/usr/bin/env python3
"""Sets MoEpic up and starts it: `python3 launch.py`. Sets its tests up and runs them: `python3 launch.py test`.

Needs nothing but Python. The first run makes `.venv` beside this file and installs what requirements.txt pins; later
runs see from a stamp that this was done and start at once. An interrupted installation continues with the next run.
Order of events only: what a checkpoint, a budget or a page is, is known to `app` alone.
Old Pythons must be able to read this file, since it is what tells their users so.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.util
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import webbrowser
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements.txt"
TEST_REQUIREMENTS = ROOT / "requirements-test.txt"
FIRST_PORT, NUM_PORTS = 7860, 100
OLDEST_PYTHON = (3, 11)
# Files of tests side by side, as far as memory allows; a file's tests share what they started.
SIDE_BY_SIDE = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")
SETTINGS = ("vram", "device", "link", "strategy")  # options that are settings of the model
CHECKS = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))

EPILOG = """\
examples:
  python3 launch.py                                   a small built-in model, to look around
  python3 launch.py --checkpoint ~/models/Qwen3-30B-A3B --vram 8GB
  python3 launch.py --checkpoint Qwen/Qwen3-30B-A3B --device cpu --link emulated:16GB/s
  python3 launch.py test [options of pytest]          set up and run the whole test suite
"""


class LaunchError(Exception):
    """The user or the machine has to change something first: one sentence, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise LaunchError(f"{message}; see python3 launch.py --help")


def main(arguments: list[str]) -> int:
    try:
        problem = python_problem(sys.version_info[:2])
        if problem:
            raise LaunchError(problem)
        if arguments[:1] == ["test"]:
            return test(arguments[1:])
        return start(arguments)
    except LaunchError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The next start continues from here.", file=sys.stderr)
        return 130


def start(arguments: list[str]) -> int:
    """The application, in its own environment unless the user wants this one."""
    options = parse(arguments)
    if not options.no_setup:
        set_up([REQUIREMENTS])
        if Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
            sys.stdout.flush()
            python = str(environment_python())
            os.execv(python, [python, str(ROOT / "launch.py"), *arguments])
    port = choose_port(options.host, options.port)
    # One core stays free for the browser and for copies: OpenMP slows down many times over when it must share a core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
    # Torch reads this when it is imported. Without it, cache slots of odd sizes leave up to a third of a GPU unusable.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        from app.main import serve
    except ModuleNotFoundError as error:
        raise LaunchError(f"{error.name} is not installed for {sys.executable}; leave --no-setup out") from error

    def ready(address: str) -> None:
        print(f"MoEpic is ready at {address} (Ctrl-C ends it)", flush=True)
        if not options.no_browser and has_display():
            webbrowser.open(address)

    return serve(
        checkpoint=options.checkpoint,
        given={name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None},
        host=options.host,
        port=port,
        auth=options.auth,
        ready=ready,
    )


def test(arguments: list[str]) -> int:
    """Linters, types, then pytest, which has the last word on the screen. The first failure is the exit code."""
    set_up([REQUIREMENTS, TEST_REQUIREMENTS])
    failure = 0
    for check in (*CHECKS, ("pytest", "-rs", *SIDE_BY_SIDE, *arguments)):
        print(f"\n== {' '.join(check)}", flush=True)
        code = subprocess.call([str(environment_python()), "-m", *check], cwd=str(ROOT))
        if code and check[0] != "pytest":
            print(f"== {check[0]} failed (exit code {code}); the other checks go on", flush=True)
        failure = failure or code
    return failure


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the application. Raises LaunchError for what cannot be meant."""
    parser = Parser(
        prog="launch.py",
        description="Run any Mixture-of-Experts checkpoint under a device-memory budget, in a page of your browser.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("model", "What is not given here is as it was last chosen on the page.")
    model.add_argument("--checkpoint", metavar="NAME", help="folder with config.json and *.safetensors, or a hub id")
    model.add_argument("--vram", metavar="SIZE", help="device memory that may be used: 6GB, 6GiB, 50%%, auto (default)")
    model.add_argument("--device", choices=("auto", "cuda", "cpu"), help="default: a GPU if present")
    model.add_argument("--link", metavar="LINK", help="without a GPU: disk (default), emulated:16GB/s, pcie4x16, ...")
    model.add_argument("--strategy", metavar="NAME", help="moepic (default) or a baseline")
    page = parser.add_argument_group("page")
    page.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default 127.0.0.1)")
    page.add_argument("--port", type=int, metavar="N", help=f"default: the first free one from {FIRST_PORT} on")
    page.add_argument("--auth", metavar="USER:PASSWORD", help="ask for a login; needed when --host is not this machine")
    page.add_argument("--no-browser", action="store_true", help="do not open a browser")
    setup = parser.add_argument_group("set-up")
    setup.add_argument("--no-setup", action="store_true", help="use this Python as it is: no .venv, no installation")
    options = parser.parse_args(arguments)
    if options.auth is not None:
        options.auth = credentials(options.auth)
    if options.auth is None and not is_loopback(options.host):
        raise LaunchError(f"--host {options.host} opens the page to other machines; add --auth user:password")
    if options.port is not None and not 1 <= options.port <= 65535:
        raise LaunchError(f"--port {options.port} is out of range; allowed is 1 to 65535")
    return options


def credentials(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise LaunchError("--auth needs a name and a password, written user:password")
    return user, password


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def choose_port(host: str, wanted: int | None) -> int:
    """`wanted` if it is free, or the first free port from FIRST_PORT on. Raises LaunchError when there is none."""
    for port in [wanted] if wanted else range(FIRST_PORT, FIRST_PORT + NUM_PORTS):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return port
        except socket.gaierror as error:
            raise LaunchError(f"--host {host} is not an address of this machine") from error
        except PermissionError as error:
            raise LaunchError(f"port {port} needs the rights of an administrator; choose one from 1024 on") from error
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise LaunchError(f"--host {host} is not an address of this machine") from error
    if wanted:
        raise LaunchError(f"port {wanted} is taken; choose another one, or leave --port out to get the next free one")
    raise LaunchError(f"ports {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} are all taken; give a free one with --port")


def has_display() -> bool:
    return sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def python_problem(version: tuple[int, int]) -> str | None:
    """Why a Python of this version will not do, or None."""
    if version >= OLDEST_PYTHON:
        return None
    found, oldest = ".".join(map(str, version)), ".".join(map(str, OLDEST_PYTHON))
    return f"MoEpic needs Python {oldest} or newer and this is {found}; install a newer one and run it with that"


def set_up(requirements: list[Path]) -> None:
    """Makes the environment and installs `requirements`, as far as that has not been done. Raises LaunchError."""
    wanted = [file for file in requirements if not is_installed(file)]
    if not wanted:
        return
    if not environment_works():
        make_environment()
    names = " and ".join(file.name for file in wanted)
    print(f"Installing {names} (the first time this takes minutes) ...", flush=True)
    command = [str(environment_python()), "-m", "pip", "install", "--disable-pip-version-check"]
    for file in wanted:
        command += ["-r", str(file)]
    if subprocess.call(command):
        raise LaunchError("the installation failed, see above; check network and disk, then run this again to continue")
    for file in wanted:
        stamp_path(file).write_text(fingerprint(file))


def is_installed(requirements: Path) -> bool:
    stamp = stamp_path(requirements)
    return stamp.is_file() and stamp.read_text() == fingerprint(requirements)


def stamp_path(requirements: Path) -> Path:
    return ENVIRONMENT / f"{requirements.stem}.installed"


def fingerprint(requirements: Path) -> str:
    """What a finished installation is recognised by: the pins and the Python that they were installed for."""
    return f"python {sys.version_info[0]}.{sys.version_info[1]} {hashlib.sha256(requirements.read_bytes()).hexdigest()}"


def environment_python() -> Path:
    return ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment_works() -> bool:
    """Whether .venv has this version of Python, and pip: an interrupted start may have left less."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    question = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.run([str(environment_python()), "-c", question], capture_output=True, text=True)
    except OSError:
        return False
    return answer.stdout.strip() == version


def make_environment() -> None:
    if any(importlib.util.find_spec(module) is None for module in ("venv", "ensurepip")):
        raise LaunchError(no_venv_message(sys.version_info[:2]))
    print(f"Making {ENVIRONMENT} ...", flush=True)
    if ENVIRONMENT.exists():
        shutil.rmtree(str(ENVIRONMENT))
    if subprocess.call([sys.executable, "-m", "venv", str(ENVIRONMENT)]):
        raise LaunchError(f"{ENVIRONMENT} could not be made, see above; check that the disk has room and is writable")


def no_venv_message(version: tuple[int, int]) -> str:
    package = f"python{version[0]}.{version[1]}-venv"
    return f"this Python lacks the module venv; install it with: sudo apt install python3-venv (or {package})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
