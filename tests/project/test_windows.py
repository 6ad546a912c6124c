"""Nothing but Triton's own compiler assumes Linux: every module is imported where the platform says
that it is Windows.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What Python lacks on Windows. Libraries are imported first: the fake is for our code.
FAKE = """
import ctypes, importlib, os, pathlib, platform, signal, sys
sys.path[:0] = [{root!r} + part for part in ("", "/kernels", "/quantize")]
import multiprocessing, subprocess, tempfile, concurrent.futures, asyncio, shutil, socket, logging.handlers
import numpy, torch, torch.nn.attention, safetensors.torch, tokenizers, ftfy, diffusers, av, typer, rich.progress, psutil, huggingface_hub
import optimum.quanto, transformers, PIL.Image, diffusers.models.transformers.transformer_wan
import diffusers.models.autoencoders.autoencoder_kl_wan
try:
    import triton, triton.language, triton.backends.compiler, triton.compiler
except ImportError:
    pass
sys.platform = "win32"
platform.system = lambda: "Windows"
for name in ("fcntl", "resource", "grp", "pwd", "termios", "tty", "pty", "posix", "syslog", "readline", "crypt"):
    sys.modules[name] = None
for name in ("O_DIRECT", "posix_fadvise", "sched_getaffinity", "sched_setaffinity", "preadv", "pread", "pwritev", "fork", "forkpty",
             "getuid", "geteuid", "getgid", "killpg", "getpgid", "setsid", "statvfs", "mkfifo", "sysconf", "nice", "getloadavg", "chown",
             "uname", "WNOHANG", "wait4", "posix_fallocate", "fdatasync", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_NONBLOCK",
             "POSIX_FADV_DONTNEED", "POSIX_FADV_SEQUENTIAL"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGSTOP", "alarm", "setitimer", "pause"):
    if hasattr(signal, name):
        delattr(signal, name)
"""


def modules() -> list[str]:
    found: list[str] = []
    for folder, package in (
        ("", "scripts"),
        ("", "lowvram"),
        ("kernels", "lowvram_kernels"),
        ("quantize", "lowvram_quantize"),
    ):
        base = ROOT / folder
        for path in sorted((base / package).rglob("*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            found += [] if name.endswith("__main__") else [name]
    return found


@pytest.mark.slow
def test_every_module_is_imported_on_windows() -> None:
    pytest.importorskip("triton")
    code = (
        FAKE.format(root=str(ROOT))
        + f"for name in {modules()!r}:\n    importlib.import_module(name)\nprint('all of them')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("all of them\n")


def test_all_modules_are_found() -> None:
    assert {
        "lowvram.cli.app",
        "lowvram_kernels.check",
        "lowvram_quantize.convert",
        "scripts.bench.run_all",
        "scripts.bench.memory_group",
    } <= set(modules())
