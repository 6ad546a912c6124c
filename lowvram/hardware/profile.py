"""The speeds of one machine: measured once by `lowvram doctor` and kept in the user's cache folder,
or taken from the table of cards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lowvram.errors import OutputError, UsageError
from lowvram.files.cache import cache_folder
from lowvram.files.checked import checked
from lowvram.files.io import replace_file

logger = logging.getLogger(__name__)

CACHE_VERSION = 2
MEASURED, TABLE, GIVEN, PREDICTED = "measured", "table", "given", "predicted"
# No more of the host's memory is page-locked: the system cannot take such pages back when it runs
# short.
PINNED_SHARE = 0.5
# One kernel launch from Python through Triton; an assumption wherever it was not measured.
LAUNCH_S = 10e-6


@dataclass(frozen=True)
class MachineProfile:
    """What a prediction of time starts from: `_bytes_s` and `_ops_s` are rates (one multiply-add is
    two operations), all above zero.

    A rate is None where the machine cannot do it or nobody knows it. `attention_ops_s` is attention
    with both products in int8; `elementwise_bytes_s` counts what is read and what is written.
    `sources`: where each number comes from, by its field's name: "measured" here, "table" of cards
    (data sheets and assumptions, `timing.cards`), "predicted" from the kernels' machine code, or
    "given" by the user.
    """

    name: str
    device: str  # cuda or cpu
    link_bytes_s: float
    disk_bytes_s: float
    host_copy_bytes_s: float
    gemm_int8_ops_s: float
    gemm_bf16_ops_s: float
    attention_ops_s: float
    attention_bf16_ops_s: float
    conv_ops_s: float
    elementwise_bytes_s: float
    vram_total_bytes: int
    vram_free_bytes: int
    ram_total_bytes: int
    pinned_limit_bytes: int
    gemm_fp8_ops_s: float | None = None
    gemm_fp32_ops_s: float | None = None
    attention_fp32_ops_s: float | None = None
    launch_s: float = LAUNCH_S
    disk_folder: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            known = value is not None or item.default is not None
            if (
                item.name.endswith("_s")
                and known
                and not (_is_number(value) and math.isfinite(value) and value > 0)
            ):
                raise UsageError(
                    f"machine profile: {item.name} is {value!r}, not a number above zero"
                )
            if item.name.endswith("_bytes") and not (_is_number(value) and 0 <= value < 2**63):
                raise UsageError(
                    f"machine profile: {item.name} is {value!r}, not an amount of memory"
                )

    @property
    def basis(self) -> str:
        """Whether the rates of computing were measured, are predicted from machine code, or come
        from the table.
        """
        return self.sources.get("gemm_int8_ops_s", TABLE)

    def gemm_ops_s(self, format: str) -> float | None:
        """The rate of the expert's linears in a format of `FORMATS`; None where it is unknown."""
        rates = {
            "fp8": self.gemm_fp8_ops_s or self.gemm_bf16_ops_s,
            "bf16": self.gemm_bf16_ops_s,
            "fp32": self.gemm_fp32_ops_s,
        }
        return rates.get(format, self.gemm_int8_ops_s)

    def attention_rate(self, format: str) -> float | None:
        """The rate of attention in a format of `FORMATS`; None where it is unknown."""
        return {"bf16": self.attention_bf16_ops_s, "fp32": self.attention_fp32_ops_s}.get(
            format, self.attention_ops_s
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MachineProfile:
        """Inverse of `to_dict`. Raises `UsageError` for a missing, unknown or impossible value."""
        try:
            unknown = set(data) - {item.name for item in fields(cls)}
            if unknown:
                raise ValueError(f"unknown key {min(unknown)[:80]!r}")
            return checked(data, cls)
        except ValueError as error:
            raise UsageError(f"not a machine profile: {error}") from error


@dataclass(frozen=True)
class ProfileKey:
    """What a cached profile belongs to; any difference means measuring anew."""

    gpu: str
    driver: str
    torch: str
    lowvram: str

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"profile-{digest[:16]}.json"


def save_profile(
    profile: MachineProfile, key: ProfileKey, folder: Path | None = None
) -> Path | None:
    """Writes the cache atomically; None and a warning where the folder cannot be written: a cache
    is never worth a failure.
    """
    folder = folder or cache_folder()
    path = folder / key.file_name
    content = {"version": CACHE_VERSION, "key": asdict(key), "profile": profile.to_dict()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    except (OSError, OutputError) as error:
        logger.warning("the machine profile is not kept: %s", error)
        return None
    return path


def any_profile(folder: Path | None = None) -> bool:
    """Whether a profile is cached at all: without one, nobody need ask torch which machine this
    is.
    """
    return next((folder or cache_folder()).glob("profile-*.json"), None) is not None


def load_profile(key: ProfileKey, folder: Path | None = None) -> MachineProfile | None:
    """The cached profile of this key; None where there is none, or where the file is damaged or
    another machine's.
    """
    path = (folder or cache_folder()) / key.file_name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is not read (%s): run `lowvram doctor` to measure again", path, error)
        return None
    if (
        not isinstance(content, dict)
        or content.get("version") != CACHE_VERSION
        or content.get("key") != asdict(key)
    ):
        logger.warning(
            "%s belongs to another machine or version: run `lowvram doctor` to measure again", path
        )
        return None
    try:
        return MachineProfile.from_dict(content["profile"])
    except (KeyError, TypeError, UsageError) as error:
        logger.warning("%s is damaged (%s): run `lowvram doctor` to measure again", path, error)
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
