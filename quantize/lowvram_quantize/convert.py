"""The quantizer's driver: from a checkpoint in any layout to a store, resumable at every tensor.

Everything is made in `MODEL/quantize.partial` and moved to its final names when all is complete,
the manifest last: what stood in MODEL before stays whole until then.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowvram.checkpoint.source import Source, open_source
from lowvram.errors import CheckpointError, DiskFullError, LowvramError, NonFiniteError, OutputError
from lowvram.files.io import output_error
from lowvram.files.lock import OutputLock
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
from lowvram_quantize.build import STATE_NAME, Build, commit
from lowvram_quantize.progress import SCAN, Meter, ProgressCallback
from lowvram_quantize.recipe import Recipe, check_same, manifest_identity, run_identity
from lowvram_quantize.report import Report, read_report
from lowvram_quantize.rows import RowEngine, count_nonfinite

_NOTE_BYTES = 1024  # per tensor: its part of header, journals, manifest and report
_NAMED = 6  # of many offending tensors
_log = logging.getLogger(__name__)


def quantize(
    source: str | Path,
    model: str | Path,
    format: str = "int8",
    resume: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Report:
    """Makes the store MODEL of the checkpoint SOURCE. The same source, format and version give the
    same bytes on any machine.

    `resume` continues an interrupted run (and starts one where there is none); without it, what
    such a run left is removed. `progress` is called after each tensor, from a thread of the
    quantizer. Whatever goes wrong, a store that stood in MODEL before stays as it was. Raises
    `CheckpointError` (`NonFiniteError` for NaN or infinity), `DiskFullError`, `OutputError`,
    `ResumeError`.
    """
    source, model, recipe = Path(source), Path(model), Recipe(format)
    if model.resolve() == source.resolve():
        raise OutputError(f"{model} is the checkpoint itself: choose another folder for the store")
    with open_source(source, allow_pickle) as opened, RowEngine(threads, device) as engine:
        layouts = {
            component: component_layout(component, opened.config, format)
            for component in COMPONENTS
        }
        build = Build(opened, recipe, layouts, run_identity(recipe, opened), model / STAGING_NAME)
        with _output_folder(model), OutputLock(model):
            if _is_finished(build, model, resume, overwrite):
                return read_report(model)
            if not (resume and build.staging.exists()):
                _check_free(model, overwrite)
                _remove_leftovers(model)
            _check_room(build, model)
            if not (build.staging / STATE_NAME).exists():  # which says that an earlier run did this
                check_finite(opened, engine, progress)
            build.run(engine, progress)
            commit(build.staging, model)
        return read_report(model)


def check_finite(
    source: Source, engine: RowEngine, progress: ProgressCallback | None = None
) -> None:
    """Reads every weight. Raises `NonFiniteError` that names the tensors with NaN or infinity and
    counts the elements.
    """
    infos = [(part, info) for part in source.components.values() for info in part.tensors.values()]
    meter = Meter(SCAN, sum(info.nbytes for _, info in infos), progress)
    bad = {}
    for part, info in infos:
        if count := count_nonfinite(engine, part.read(info.name)):
            bad[f"{part.component} {info.name}"] = count
        meter.advance(part.component, info.name, info.nbytes)
    if bad:
        texts = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:_NAMED])
        rest = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise NonFiniteError(
            f"{source.path}: NaN or infinity in {len(bad)} tensors: {texts}{rest}: download "
            f"the checkpoint again"
        )


@contextmanager
def _output_folder(model: Path) -> Iterator[None]:
    """Makes the folder; takes it away again where the run ended before it wrote anything. Says how
    to go on after an interruption.
    """
    try:
        model.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.filename is None:  # not about a file: no memory to map the source, for one
            raise LowvramError(
                f"cannot quantize to {model}: {error.strerror or error}: go on with --resume "
                f"when that is mended"
            ) from error
        raise output_error(
            Path(error.filename), error, "make room and go on with --resume"
        ) from error
    except KeyboardInterrupt:
        if (model / STAGING_NAME).exists():
            _log.warning(
                "interrupted: go on with --resume, what is finished is kept in %s",
                model / STAGING_NAME,
            )
        raise
    finally:
        with suppress(OSError):  # not empty: there is something to keep
            model.rmdir()


def _is_finished(build: Build, model: Path, resume: bool, overwrite: bool) -> bool:
    """Whether this very store is complete already: a run that was killed at its last step is
    resumed by doing nothing.
    """
    if not (resume and (model / MANIFEST_NAME).exists()) or (overwrite and build.staging.exists()):
        return False
    try:
        found = manifest_identity(read_manifest(model))
    except CheckpointError:
        if build.staging.exists():  # an unreadable old store is being replaced
            return False
        raise
    if not build.staging.exists():
        check_same(found, build.identity, str(model))
    elif found == build.identity:
        shutil.rmtree(build.staging)
    return found == build.identity


def _check_free(model: Path, overwrite: bool) -> None:
    if overwrite:
        return
    if (model / MANIFEST_NAME).exists():
        raise OutputError(
            f"{model} holds a finished store: choose another folder, or --overwrite to replace it"
        )
    taken = [name for name in STORE_FILES if (model / name).exists()]
    if taken:
        raise OutputError(
            f"{model} holds {', '.join(taken)} of something else: choose another folder, or "
            f"--overwrite to replace them"
        )


def _remove_leftovers(model: Path) -> None:
    for path in leftovers(model):
        _log.warning(
            "removing %s, left by a run that did not finish (--resume would have continued it)",
            path,
        )
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_room(build: Build, model: Path) -> None:
    """Before any work: what the store needs beyond what an earlier run has written."""
    if (build.staging / MANIFEST_NAME).exists():
        return  # nothing is left but to move files
    tensors = sum(len(layout.tensors) for layout in build.layouts.values())
    total = (
        sum(layout.total_bytes for layout in build.layouts.values())
        + len(build.source.tokenizer)
        + _NOTE_BYTES * tensors
    )
    there = (
        [path.stat().st_size for path in build.staging.glob("*")] if build.staging.exists() else []
    )
    needed, free = max(0, total - sum(there)), shutil.disk_usage(model).free
    if needed > free:
        raise DiskFullError(
            f"{model} needs {format_bytes(needed)}, but its file system has "
            f"{format_bytes(free)} free: make room or choose another folder"
        )
