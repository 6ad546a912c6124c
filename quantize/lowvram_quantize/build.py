"""Build or resume a store in a staging folder and move it to its final names."""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lowvram.checkpoint.source import Source
from lowvram.errors import CheckpointError
from lowvram.files.write import replace_file, sync_folder
from lowvram.store.layout import ComponentLayout, StoredTensor
from lowvram.store.manifest import (
    MANIFEST_NAME,
    REPORT_NAME,
    STORE_FILES,
    TOKENIZER_NAME,
    ComponentManifest,
    Manifest,
    component_file,
)
from lowvram.store.writer import StoreWriter
from lowvram_quantize.component import ComponentMaker
from lowvram_quantize.journal import RunJournal
from lowvram_quantize.progress import QUANTIZE, Meter, ProgressCallback
from lowvram_quantize.recipe import Recipe, lowvram_version, run_identity, source_record
from lowvram_quantize.report import QuantizationReport, TensorError
from lowvram_quantize.rows import ErrorSums, RowEngine

JOURNAL_NAME = "run.jsonl"


@dataclass(frozen=True)
class Build:
    """One build of a store: its source, recipe and layouts, and the staging folder.

    layouts: by component; identity: what `recipe.run_identity` returns for this recipe and source.
    """

    source: Source
    recipe: Recipe
    layouts: dict[str, ComponentLayout]
    identity: dict[str, str]
    staging: Path

    def run(self, engine: RowEngine, progress: ProgressCallback | None) -> None:
        """Write the missing parts of the store into the staging folder, the manifest last.

        Raises `ResumeError` if the staging folder belongs to another build, `CheckpointError` if
        the source changed meanwhile, `DiskFullError` or `OutputError` if a write fails.
        """
        self.staging.mkdir(exist_ok=True)
        with RunJournal(self.staging / JOURNAL_NAME, self.identity) as journal:
            if (self.staging / MANIFEST_NAME).exists():
                return
            meter = Meter(
                QUANTIZE, sum(layout.total_bytes for layout in self.layouts.values()), progress
            )
            components = {
                name: self.component(name, engine, journal, meter) for name in self.layouts
            }
            self._check_source_unchanged()
            replace_file(self.staging / TOKENIZER_NAME, self.source.tokenizer)
            replace_file(self.staging / REPORT_NAME, self._report(journal).to_json().encode())
            self._manifest(components).write(self.staging)

    def component(
        self, name: str, engine: RowEngine, journal: RunJournal, meter: Meter
    ) -> ComponentManifest:
        """Write the file of one component, continuing where an earlier run stopped."""
        layout = self.layouts[name]
        run = ComponentRun(
            name, ComponentMaker(self.source.components[name], layout, engine), journal, meter
        )
        file = component_file(name)
        with StoreWriter(
            self.staging / file, layout.tensors, layout.metadata(), self.identity, resume=True
        ) as writer:
            return ComponentManifest(file, writer.header_sha256, run.write(writer))

    def _check_source_unchanged(self) -> None:
        try:
            same = run_identity(self.recipe, self.source) == self.identity
        except OSError:  # one of its files was removed
            same = False
        if not same:
            raise CheckpointError(
                f"{self.source.path} changed while it was read: start again without --resume"
            )

    def _report(self, journal: RunJournal) -> QuantizationReport:
        order = [
            (name, stored.name)
            for name, layout in self.layouts.items()
            for stored in layout.tensors
        ]
        errors = tuple(journal.errors[key] for key in order if key in journal.errors)
        source_bytes = sum(
            info.nbytes
            for component in self.source.components.values()
            for info in component.tensors.values()
        )
        return QuantizationReport(
            self.recipe.to_dict(),
            source_bytes,
            sum(layout.total_bytes for layout in self.layouts.values()),
            errors,
        )

    def _manifest(self, components: dict[str, ComponentManifest]) -> Manifest:
        return Manifest(
            self.source.config,
            self.recipe.format,
            self.recipe.to_dict(),
            source_record(self.source),
            components,
            hashlib.sha256(self.source.tokenizer).hexdigest(),
            lowvram_version(),
        )


def commit(staging: Path, model: Path) -> None:
    """Move a complete store from `staging` to `model`.

    The folder has no manifest meanwhile, so a mixture of two stores cannot be opened. It needs no
    disk space, and after a crash a second call completes the move.
    """
    if (staging / MANIFEST_NAME).exists():
        (model / MANIFEST_NAME).unlink(missing_ok=True)
        sync_folder(model)
        for name in STORE_FILES:
            if (staging / name).exists():
                os.replace(staging / name, model / name)
        sync_folder(model)
        os.replace(staging / MANIFEST_NAME, model / MANIFEST_NAME)
        sync_folder(model)
    shutil.rmtree(staging)


class ComponentRun:
    """Writes the file of one component.

    Each tensor is converted while a background thread hashes and writes the previous one.
    """

    def __init__(
        self, component: str, maker: ComponentMaker, journal: RunJournal, meter: Meter
    ) -> None:
        self._component = component
        self._maker = maker
        self._journal = journal
        self._meter = meter

    def write(self, writer: StoreWriter) -> dict[str, str]:
        """Write the remaining tensors; return name -> SHA-256 for all tensors of the file."""
        remaining = writer.remaining
        self._meter.skip(writer.written_bytes)
        self._restore_errors(writer.tensors[: len(writer.tensors) - len(remaining)])
        with ThreadPoolExecutor(1) as background:
            pending = None
            for stored in remaining:
                converted = self._maker.make(stored)
                if pending:
                    pending.result()
                pending = background.submit(self._write_one, writer, stored, *converted)
            if pending:
                pending.result()
        return writer.finish()

    def _write_one(
        self, writer: StoreWriter, stored: StoredTensor, tensor: Tensor, error: ErrorSums | None
    ) -> None:
        writer.write(tensor)
        self._record(stored, error)
        self._meter.advance(self._component, stored.name, stored.nbytes)

    def _restore_errors(self, written: tuple[StoredTensor, ...]) -> None:
        """Measure again the errors of written tensors that a crash removed from the journal."""
        for stored in written:
            if (
                self._maker.is_lossy(stored)
                and (self._component, stored.name) not in self._journal.errors
            ):
                self._record(stored, self._maker.make(stored)[1])

    def _record(self, stored: StoredTensor, error: ErrorSums | None) -> None:
        """Add the error of a tensor, if it has one, to the journal."""
        if error is not None:
            self._journal.add(TensorError.of(self._component, stored.name, stored.dtype, error))
