"""The speed profile of one machine: measured by `lowvram doctor` and cached on disk, or taken from
the table of cards.
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
from lowvram.files.sealed import read_sealed, write_sealed

logger = logging.getLogger(__name__)

CACHE_VERSION = 3
MEASURED, TABLE, GIVEN, PREDICTED = "measured", "table", "given", "predicted"
# Upper bound of page-locked memory as a share of RAM: the system cannot swap or reclaim it.
PINNED_SHARE = 0.5
# Time of one kernel launch from Python through Triton; an assumption, used if not measured.
LAUNCH_S = 10e-6


@dataclass(frozen=True)
class MachineProfile:
    """Speeds and memory of a machine, the input of time predictions.

    `*_bytes_s` are bytes per second and `*_ops_s` operations per second (a multiply-add is two
    operations), all above zero; an optional rate is None if unsupported or unknown. `*_bytes` are
    amounts of memory.

    device: cuda or cpu. attention_ops_s: attention with both products in int8.
    elementwise_bytes_s: bytes read plus bytes written. launch_s: seconds of one kernel launch.
    disk_folder: a folder on the measured disk. sources: origin of a number by field name, one of
    `MEASURED` (on this machine), `TABLE` (data sheets and assumptions of `timing.cards`),
    `PREDICTED` (from the kernels' machine code) or `GIVEN` (by the user).

    Raises `UsageError` for an impossible value.
    """

    name: str
    device: str
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
        """Origin of the compute rates, as in `sources`."""
        return self.sources.get("gemm_int8_ops_s", TABLE)

    def gemm_ops_s(self, format: str) -> float | None:
        """Operations per second of the experts' linear layers in a format of `FORMATS`; None if
        unknown.
        """
        rates = {
            "fp8": self.gemm_fp8_ops_s or self.gemm_bf16_ops_s,
            "bf16": self.gemm_bf16_ops_s,
            "fp32": self.gemm_fp32_ops_s,
        }
        return rates.get(format, self.gemm_int8_ops_s)

    def attention_rate(self, format: str) -> float | None:
        """Operations per second of attention in a format of `FORMATS`; None if unknown."""
        return {"bf16": self.attention_bf16_ops_s, "fp32": self.attention_fp32_ops_s}.get(
            format, self.attention_ops_s
        )

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON values."""
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
    """GPU and software that a cached profile is valid for; with any difference it is not used."""

    gpu: str
    driver: str
    torch: str
    lowvram: str

    @property
    def file_name(self) -> str:
        """Name of the cache file of this key."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"profile-{digest[:16]}.json"


def save_profile(
    profile: MachineProfile, key: ProfileKey, folder: Path | None = None
) -> Path | None:
    """Write a profile to the cache atomically and return its path.

    folder: default the user's cache folder. If it cannot be written, logs a warning and returns
    None.
    """
    folder = folder or cache_folder()
    path = folder / key.file_name
    content = {"version": CACHE_VERSION, "key": asdict(key), "profile": profile.to_dict()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(path, content)
    except (OSError, OutputError) as error:
        logger.warning("cannot save the machine profile: %s", error)
        return None
    return path


def any_profile(folder: Path | None = None) -> bool:
    """Whether any profile is cached. If not, a caller can skip importing torch to build a key."""
    return next((folder or cache_folder()).glob("profile-*.json"), None) is not None


def load_profile(key: ProfileKey, folder: Path | None = None) -> MachineProfile | None:
    """Read the cached profile of `key`.

    folder: default the user's cache folder. None if there is none; None with a warning if the file
    is unreadable, damaged or of another key or version.
    """
    path = (folder or cache_folder()) / key.file_name
    try:
        content = read_sealed(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("cannot read %s (%s): run `lowvram doctor` to measure again", path, error)
        return None
    if content.get("version") != CACHE_VERSION or content.get("key") != asdict(key):
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
