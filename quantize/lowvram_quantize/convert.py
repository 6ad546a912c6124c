"""Convert a checkpoint of any supported layout to a store; resumable at every tensor.

The store is written to `MODEL/quantize.partial` and moved to its final names when it is complete,
the manifest last. Until then an earlier store in MODEL stays intact.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lowvram.checkpoint.source import Source, check_distinct_experts, open_source
from lowvram.errors import CheckpointError, DiskFullError, LowvramError, NonFiniteError, OutputError
from lowvram.files.lock import OutputLock
from lowvram.files.write import output_error, refuse_foreign
from lowvram.lora.file import LoraChoice, parse_choice, with_loras
from lowvram.store.layout import component_layout
from lowvram.store.manifest import (
    MANIFEST_NAME,
    STAGING_NAME,
    STORE_FILES,
    leftovers,
    read_manifest,
)
from lowvram.units import format_bytes
from lowvram.variants import COMPONENTS
from lowvram_quantize.build import JOURNAL_NAME, Build, commit
from lowvram_quantize.progress import SCAN, Meter, ProgressCallback
from lowvram_quantize.recipe import Recipe, check_same, manifest_identity, run_identity
from lowvram_quantize.report import QuantizationReport, read_report
from lowvram_quantize.rows import RowEngine, count_nonfinite

_METADATA_BYTES = 1024  # per tensor, of header, journals, manifest and report together
_MAX_NAMED = 6  # tensors with NaN that an error message lists
_log = logging.getLogger(__name__)


def quantize(
    source: str | Path,
    model: str | Path,
    format: str = "int8",
    resume: bool = False,
    allow_pickle: bool = False,
    allow_links: bool = False,
    loras: Sequence[LoraChoice | str] = (),
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> QuantizationReport:
    """Quantize the checkpoint `source` into the store `model` and return the report.

    The same source, format and version give the same bytes on every machine.

    format: a key of `lowvram.formats.FORMATS`.
    resume: continue an interrupted run, or start one if there is none; without it the files of an
    interrupted run are removed.
    allow_pickle: read `.pth` files with torch's restricted unpickler.
    allow_links: follow links that point out of `source`.
    loras: merged into the experts' weights in fp32 before they are quantized, in this order; a text
    is `FILE` or `FILE:STRENGTH`, for both experts.
    overwrite: replace a store in `model`; it stays intact if the run fails.
    progress: called after each tensor, from a thread of the quantizer.
    threads: default torch's number of threads; device: does the arithmetic.

    Raises `CheckpointError` (`NonFiniteError` for NaN or infinity), `DiskFullError`, `OutputError`,
    `ResumeError`, `LoraError`, and `UsageError` for an unknown format.
    """
    source, model, recipe = Path(source), Path(model), Recipe(format)
    choices = [parse_choice(item) if isinstance(item, str) else item for item in loras]
    if os.path.realpath(model) == os.path.realpath(source):
        raise OutputError(f"{model} is the checkpoint itself: choose another folder for the result")
    with (
        _system_errors(model),
        open_source(source, allow_pickle, allow_links) as plain,
        with_loras(plain, choices) as opened,
        RowEngine(threads, device) as engine,
    ):
        check_distinct_experts(plain)
        layouts = {
            component: component_layout(component, opened.config, format)
            for component in COMPONENTS
        }
        build = Build(opened, recipe, layouts, run_identity(recipe, opened), model / STAGING_NAME)
        with _output_folder(model), OutputLock(model):
            refuse_foreign(build.staging, folder=True)
            if _is_finished(build, model, resume, overwrite):
                return read_report(model)
            if not (resume and build.staging.exists()):
                _check_vacant(model, overwrite)
                _remove_leftovers(model)
            _check_room(build, model)
            if not (build.staging / JOURNAL_NAME).exists():  # the journal means: checked
                check_finite(opened, engine, progress)
            build.run(engine, progress)
            commit(build.staging, model)
        return read_report(model)


def check_finite(
    source: Source, engine: RowEngine, progress: ProgressCallback | None = None
) -> None:
    """Read every weight and raise `NonFiniteError` if any is NaN or infinite.

    The message names the tensors and counts their elements.
    """
    infos = [(part, info) for part in source.components.values() for info in part.tensors.values()]
    meter = Meter(SCAN, sum(info.nbytes for _, info in infos), progress)
    bad = {}
    for part, info in infos:
        if count := count_nonfinite(engine, part.rows(info.name)):
            bad[f"{part.component} {info.name}"] = count
        meter.advance(part.component, info.name, info.nbytes)
    if bad:
        texts = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:_MAX_NAMED])
        rest = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
        raise NonFiniteError(
            f"{source.path}: NaN or infinity in {len(bad)} tensors: {texts}{rest}: download "
            f"the checkpoint again"
        )


@contextmanager
def _system_errors(model: Path) -> Iterator[None]:
    """Raise the system's errors as `OutputError` or, if they name no file, `LowvramError`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # not about a file, such as no memory for a read
            raise LowvramError(
                f"cannot quantize to {model}: {error.strerror or error}: go on with --resume "
                f"once that is fixed"
            ) from error
        raise output_error(
            Path(error.filename), error, "make room and go on with --resume"
        ) from error


@contextmanager
def _output_folder(model: Path) -> Iterator[None]:
    """Create the output folder for a run; remove it if the run ends before it writes anything.

    After an interruption it logs how to continue.
    """
    try:
        model.mkdir(parents=True, exist_ok=True)
        yield
    except KeyboardInterrupt:
        if (model / STAGING_NAME).exists():
            _log.warning(
                "interrupted: go on with --resume; the finished part is kept in %s",
                model / STAGING_NAME,
            )
        raise
    finally:
        with suppress(OSError):  # the folder is not empty
            model.rmdir()


def _is_finished(build: Build, model: Path, resume: bool, overwrite: bool) -> bool:
    """Return whether `model` already holds the complete store of this build.

    That is so when an earlier run was killed at its last step. It removes the staging folder then.
    Raises `ResumeError` if `model` holds the store of another build.
    """
    if not (resume and (model / MANIFEST_NAME).exists()) or (overwrite and build.staging.exists()):
        return False
    try:
        found = manifest_identity(read_manifest(model))
    except CheckpointError:
        if build.staging.exists():  # the run replaces an unreadable store
            return False
        raise
    if not build.staging.exists():
        check_same(found, build.identity, str(model))
    elif found == build.identity:
        shutil.rmtree(build.staging)
    return found == build.identity


def _check_vacant(model: Path, overwrite: bool) -> None:
    """Raise `OutputError` if `model` holds a store or files of its names and not `overwrite`."""
    if overwrite:
        return
    if (model / MANIFEST_NAME).exists():
        raise OutputError(
            f"{model} holds a quantized model: choose another folder, or --overwrite to replace it"
        )
    taken = [name for name in STORE_FILES if (model / name).exists()]
    if taken:
        raise OutputError(
            f"{model} holds other files named {', '.join(taken)}: choose another folder, or "
            f"--overwrite to replace them"
        )


def _remove_leftovers(model: Path) -> None:
    """Remove the files of an unfinished run."""
    for path in leftovers(model):
        _log.warning(
            "removing %s of an unfinished run (--resume would have continued it)",
            path,
        )
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_room(build: Build, model: Path) -> None:
    """Raise `DiskFullError` if the rest of the store does not fit on the disk."""
    if (build.staging / MANIFEST_NAME).exists():
        return  # complete; moving files needs no space
    tensors = sum(len(layout.tensors) for layout in build.layouts.values())
    total = (
        sum(layout.total_bytes for layout in build.layouts.values())
        + len(build.source.tokenizer)
        + _METADATA_BYTES * tensors
    )
    existing = (
        [path.stat().st_size for path in build.staging.glob("*")] if build.staging.exists() else []
    )
    needed, free = max(0, total - sum(existing)), shutil.disk_usage(model).free
    if needed > free:
        raise DiskFullError(
            f"{model} needs {format_bytes(needed)}, but its file system has "
            f"{format_bytes(free)} free: make room or choose another folder"
        )
