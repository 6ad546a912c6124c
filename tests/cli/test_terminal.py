"""What is printed: text from outside, and every kind of output."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowvram.cli import progress as progress_module
from lowvram.cli.report_tables import doctor_table, inspect_table
from lowvram.cli.terminal import make_console, printable
from lowvram.files import write
from lowvram.units import parse_bytes, parse_size

ROOT = Path(__file__).parents[2]
HOSTILE = "a [/red] \x1b[31m [bold]circle\nerror: none \u202e:smile:"


def lowvram(
    *arguments: str, stdout: Any = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((".", "kernels", "quantize"))
    return subprocess.run(
        [sys.executable, "-m", "lowvram", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths} | variables,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_p29_what_is_not_printable_is_shown_as_its_escape() -> None:
    assert printable(HOSTILE) == ("a [/red] \\x1b[31m [bold]circle\\nerror: none \\u202e:smile:")
    assert printable("ein Häuschen 山 🎈") == "ein Häuschen 山 🎈"
    assert printable("\udcff") == "\\udcff"


@pytest.mark.parametrize("terminal", [True, False])
def test_p29_hostile_text_is_printed_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    console = make_console()
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: terminal))
    console.print("a [/red] [bold]circle :smile:")
    report = {
        "kind": "source",
        "layout": HOSTILE,
        "path": HOSTILE,
        "components": {HOSTILE: {"tensors": 1, "bytes": 1, "dtypes": {HOSTILE: {"bytes": 1}}}},
    }
    finding = {"name": "GPU", "status": "ok", "detail": HOSTILE, "advice": HOSTILE}
    console.print(inspect_table(report))
    console.print(doctor_table({"findings": [finding]}))
    assert progress_module.LINE_PERIOD_S
    shown = capsys.readouterr().out
    assert "[/red]" in shown
    assert "\x1b[31m" not in shown.replace("\x1b[31mmissing", "")
    assert "\u202e" not in shown


def test_p29_an_error_with_a_hostile_path_is_one_line(tmp_path: Path) -> None:
    done = lowvram("inspect", str(tmp_path / "[/red]\x1b[2J\nerror: forged"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "[/red]\\x1b[2J\\nerror: forged" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_p29_a_full_standard_output_is_an_error_in_one_line(more: list[str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = lowvram("plan", "t2v-a14b", "--size", "480p", *more, stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write to the standard output: No space left")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_p29_the_output_never_decides_the_exit_code_of_finished_work(tmp_path: Path) -> None:
    out = tmp_path / "山.mp4"
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = lowvram("demo", "-o", str(out), "--format", "bf16", stdout=full)
    assert done.returncode == 0, done.stderr
    assert "the work itself is done" in done.stderr
    assert out.exists()


def test_p29_a_closed_pipe_is_no_error() -> None:
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "w") as pipe:
        done = lowvram("plan", "t2v-a14b", "--size", "480p", stdout=pipe)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_p29_an_encoding_without_a_character_gets_its_escape(encoding: str, tmp_path: Path) -> None:
    done = lowvram("inspect", str(tmp_path / "山"), PYTHONIOENCODING=encoding)
    assert done.returncode == 1
    assert "\\u5c71 does not exist" in done.stderr.replace("\n", " ")


def test_a_number_without_its_unit_is_asked_about() -> None:
    for text in ("8", "8.5", "1048575"):
        with pytest.raises(Exception, match=rf"did you mean {text}GiB, or {text}GB\?"):
            parse_bytes(text)
    assert parse_bytes("8G") == parse_bytes("8GB") == 8 * 10**9
    assert parse_bytes("0") == 0
    assert parse_bytes("8589934592") == 2**33


def test_sizes_have_names() -> None:
    assert (parse_size("480p"), parse_size("720P")) == ((832, 480), (1280, 720))


def test_the_version_is_printed() -> None:
    done = lowvram("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("lowvram 0.")


@pytest.mark.parametrize("code", ["EINVAL", "EIO", "ENOSYS"])
def test_p30_a_folder_that_cannot_be_synced_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(getattr(errno, code), code)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write.replace_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"], ["plan"]])
def test_p29_help_into_a_full_device_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lowvram", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
    assert done.returncode == (2 if arguments == ["plan"] else 1)
    assert "Traceback" not in done.stderr
    assert arguments == ["plan"] or done.stderr.count("error: cannot write") == 1
