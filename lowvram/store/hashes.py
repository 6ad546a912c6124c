"""Compare the tensors of a store's file with their hashes in the manifest when first read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from lowvram.errors import IntegrityError


class TensorHashes:
    """Hashes of the tensors of one file, and which of them have been compared.

    expected: SHA-256 by tensor name, as in the manifest. Methods may be called from several
    threads.
    """

    def __init__(self, path: Path, expected: Mapping[str, str]) -> None:
        self._path = path
        self._expected = expected
        self._checked: set[str] = set()

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that have not been compared."""
        return [name for name in names if name not in self._checked]

    def check(self, name: str, data: memoryview) -> None:
        """Compare a tensor's bytes with its hash. Raises `IntegrityError`."""
        self._compare(name, hashlib.sha256(data).hexdigest())

    def check_pieces(self, name: str, pieces: Iterable[memoryview]) -> None:
        """The same for a tensor that is read in pieces."""
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        self._compare(name, digest.hexdigest())

    def tasks(self, tensors: Mapping[str, memoryview]) -> list[Callable[[], None]]:
        """Comparisons of `tensors` (name -> bytes) to run in any order, the largest first."""
        largest = sorted(tensors, key=lambda name: -tensors[name].nbytes)
        return [self._task(name, tensors[name]) for name in largest]

    def _task(self, name: str, data: memoryview) -> Callable[[], None]:
        return lambda: self.check(name, data)

    def _compare(self, name: str, found: str) -> None:
        if found != self._expected[name]:
            raise IntegrityError(
                f"{self._path}: {name} differs from its hash in the manifest: quantize again or "
                f"restore the file; `lowvram inspect {self._path.parent} --verify` lists all "
                f"differences"
            )
        self._checked.add(name)
