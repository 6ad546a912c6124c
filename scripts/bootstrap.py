"""Makes `.venv` in the root of the repository, with lowvram and its tools in it, and runs one
command there.

    python scripts/bootstrap.py setup                 only make it, or bring it up to date
    python scripts/bootstrap.py demo [ARGS]           python -m lowvram demo ARGS
    python scripts/bootstrap.py run ARGS              python -m lowvram ARGS
    python scripts/bootstrap.py lint | format | type | contracts | test [ARGS]
    python scripts/bootstrap.py --torch-index URL …   also look there for torch: PyTorch's CPU index saves some GB where there is no GPU,
                                                      its CUDA index is needed on Windows

Needs Python 3.10 or later and nothing else. What is installed is remembered by a hash of
pyproject.toml and constraints.txt, so that a second call starts at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = "lowvram-installed.txt"
MIN_PYTHON = (3, 10)


def processors() -> int:
    """How many processors this process may use, as many as tests run side by side."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


COMMANDS = {
    "setup": [],
    "demo": ["-m", "lowvram", "demo"],
    "run": ["-m", "lowvram"],
    "lint": ["-m", "ruff", "check", "."],
    "format": ["-m", "ruff", "format", "--check", "."],
    "type": ["-m", "mypy"],
    "contracts": [
        "-c",
        "import sys; from importlinter.cli import lint_imports_command; "
        "sys.exit(lint_imports_command())",
    ],
    "test": [
        "-m",
        "pytest",
        "-q",
        "--durations=15",
        "-n",
        str(processors()),
        "--dist",
        "worksteal",
    ],
}


class BootstrapError(Exception):
    """One line: what failed and what to do."""


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        check_python(sys.version_info[:2])
        python = make_environment(options.torch_index)
    except BootstrapError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    command = COMMANDS[options.command]
    return run([str(python), *command, *options.arguments]) if command else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bootstrap.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--torch-index",
        metavar="URL",
        help="a further package index, for a build of torch that is not the usual one",
    )
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed on to the command")
    return parser.parse_args(arguments)


def check_python(version: tuple[int, ...]) -> None:
    if version < MIN_PYTHON:
        found, needed = (".".join(map(str, numbers)) for numbers in (version, MIN_PYTHON))
        raise BootstrapError(
            f"this is Python {found}, lowvram needs {needed} or later: install one and call "
            f"this script with it"
        )


def make_environment(torch_index: str | None, venv: Path = VENV) -> Path:
    """The environment's python, after whatever was missing is there. Raises `BootstrapError`."""
    python, stamp, wanted = python_of(venv), venv / STAMP, fingerprint()
    if not works(python):
        create(venv)
    elif stamp.is_file() and up_to_date(
        stamp.read_text(encoding="utf-8").split(), wanted, torch_index
    ):
        return python
    stamp.unlink(missing_ok=True)
    install(python, torch_index)
    stamp.write_text(f"{wanted} {torch_index or ''}\n", encoding="utf-8")
    return python


def up_to_date(installed: list[str], wanted: str, torch_index: str | None) -> bool:
    """Without `--torch-index`, whichever build of torch is there stays."""
    return installed[:1] == [wanted] and torch_index in (None, *installed[1:])


def python_of(venv: Path) -> Path:
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def fingerprint() -> str:
    """Changes when what has to be installed changes, or where the repository lies."""
    digest = hashlib.sha256(f"{ROOT}\n{platform.python_version()}\n".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def works(python: Path) -> bool:
    """A half-made environment has no python, one that does not start, or no pip."""
    try:
        done = subprocess.run(
            [str(python), "-m", "pip", "--version"], capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


def create(venv: Path) -> None:
    say(f"making {venv}")
    if run([sys.executable, "-m", "venv", "--clear", str(venv)]):
        raise BootstrapError(
            "cannot make the environment: on Debian and Ubuntu install python3-venv, "
            "elsewhere Python with venv and pip"
        )


def install(python: Path, torch_index: str | None) -> None:
    if torch_index is None:
        advise_on_torch(sys.platform, shutil.which("nvidia-smi") is not None)
    say("installing lowvram with its tools; the first time takes some minutes")
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--editable", f"{ROOT}[dev]"]
    if torch_index is not None:
        command += ["--extra-index-url", torch_index, "--upgrade", "torch"]
    if run(command):
        raise BootstrapError(
            "pip failed, see above: check the network and the disk, then call this script again"
        )


def advise_on_torch(system: str, has_gpu: bool) -> None:
    """PyPI has torch with CUDA for Linux and without for Windows."""
    if system == "linux" and not has_gpu:
        say(
            "no NVIDIA GPU seen: --torch-index with PyTorch's CPU index (pytorch.org, Get "
            "started) would save some GB"
        )
    if system == "win32" and has_gpu:
        say(
            "for the NVIDIA GPU, call this again with --torch-index and PyTorch's CUDA index "
            "(pytorch.org, Get started)"
        )


def run(command: list[str]) -> int:
    """The exit status of the command, run in the root; 130 after Ctrl-C."""
    try:
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    except KeyboardInterrupt:
        return 130


def say(message: str) -> None:
    print(f"bootstrap: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
