"""Builds a store inside a staging folder, continuing what is there, and moves it to its final
names.
"""

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
from lowvram.files.io import replace_file, sync_folder
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
from lowvram_quantize.progress import QUANTIZE, Meter, ProgressCallback
from lowvram_quantize.recipe import Recipe, lowvram_version, run_identity, source_record
from lowvram_quantize.report import Report, TensorError
from lowvram_quantize.rows import ErrorSums, RowEngine
from lowvram_quantize.state import RunState

STATE_NAME = "run.jsonl"


@dataclass(frozen=True)
class Build:
    """One run: what it reads, what it makes of it, and the folder it works in until all is
    complete.
    """

    source: Source
    recipe: Recipe
    layouts: dict[str, ComponentLayout]
    identity: dict[str, str]
    staging: Path

    def run(self, engine: RowEngine, progress: ProgressCallback | None) -> None:
        """Writes whatever of the store is still missing in the staging folder, its manifest
        last.
        """
        self.staging.mkdir(exist_ok=True)
        with RunState(self.staging / STATE_NAME, self.identity) as state:
            if (self.staging / MANIFEST_NAME).exists():
                return
            meter = Meter(
                QUANTIZE, sum(layout.total_bytes for layout in self.layouts.values()), progress
            )
            components = {name: self.component(name, engine, state, meter) for name in self.layouts}
            self._check_source_unchanged()
            replace_file(self.staging / TOKENIZER_NAME, self.source.tokenizer)
            replace_file(self.staging / REPORT_NAME, self._report(state).to_json().encode())
            self._manifest(components).write(self.staging)

    def component(
        self, name: str, engine: RowEngine, state: RunState, meter: Meter
    ) -> ComponentManifest:
        """Writes the file of one component, from where an earlier run stopped."""
        layout = self.layouts[name]
        run = ComponentRun(
            name, ComponentMaker(self.source.components[name], layout, engine), state, meter
        )
        file = component_file(name)
        with StoreWriter(
            self.staging / file, layout.tensors, layout.metadata(), self.identity, resume=True
        ) as writer:
            return ComponentManifest(file, writer.header_sha256, run.write(writer))

    def _check_source_unchanged(self) -> None:
        try:
            same = run_identity(self.recipe, self.source) == self.identity
        except OSError:  # a file of it is gone
            same = False
        if not same:
            raise CheckpointError(
                f"{self.source.path} changed while it was read: start again without --resume"
            )

    def _report(self, state: RunState) -> Report:
        order = [
            (name, stored.name)
            for name, layout in self.layouts.items()
            for stored in layout.tensors
        ]
        errors = tuple(state.errors[key] for key in order if key in state.errors)
        source_bytes = sum(
            info.nbytes
            for component in self.source.components.values()
            for info in component.tensors.values()
        )
        return Report(
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
    """Moves a complete store from `staging` to `model`. While it is under way there is no manifest,
    so nothing opens a mixture.

    Needs no room on the disk. Done again after a crash, it finishes what is left.
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
    """Writes one component's file: the next tensor is made while a thread hashes and writes the one
    before.
    """

    def __init__(
        self, component: str, maker: ComponentMaker, state: RunState, meter: Meter
    ) -> None:
        self._component = component
        self._maker = maker
        self._state = state
        self._meter = meter

    def write(self, writer: StoreWriter) -> dict[str, str]:
        """Name -> sha256 of the whole file, what an earlier run wrote included."""
        remaining = writer.remaining
        self._meter.skip(writer.written_bytes)
        self._restore_errors(writer.tensors[: len(writer.tensors) - len(remaining)])
        with ThreadPoolExecutor(1) as background:
            pending = None
            for stored in remaining:
                made = self._maker.make(stored)
                if pending:
                    pending.result()
                pending = background.submit(self._write_one, writer, stored, *made)
            if pending:
                pending.result()
        return writer.finish()

    def _write_one(
        self, writer: StoreWriter, stored: StoredTensor, tensor: Tensor, error: ErrorSums | None
    ) -> None:
        writer.write(tensor)
        self._note(stored, error)
        self._meter.advance(self._component, stored.name, stored.nbytes)

    def _restore_errors(self, written: tuple[StoredTensor, ...]) -> None:
        """Measures again what a crash took from the state."""
        for stored in written:
            if (
                self._maker.loses(stored)
                and (self._component, stored.name) not in self._state.errors
            ):
                self._note(stored, self._maker.make(stored)[1])

    def _note(self, stored: StoredTensor, error: ErrorSums | None) -> None:
        if error is not None:
            self._state.add(TensorError.of(self._component, stored.name, stored.dtype, error))
