"""Whether the encoder of videos is there. Imports no torch."""

from __future__ import annotations

from lowvram.errors import UnsupportedError

ENCODER = "libx264"


def check_encoder() -> None:
    """Raise `UnsupportedError` if PyAV, or the encoder in it, is missing."""
    try:
        import av

        av.codec.Codec(ENCODER, "w")
    except (ImportError, ValueError) as error:
        reason = (
            "PyAV is not installed" if isinstance(error, ImportError) else f"no {ENCODER} in it"
        )
        raise UnsupportedError(
            f"videos cannot be written ({reason}): install the wheel from PyPI with `pip install "
            f"--force-reinstall av`"
        ) from error
