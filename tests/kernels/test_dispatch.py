"""Which backend runs an op, and the reasons of refusals."""

from __future__ import annotations

import pytest
from lowvram_kernels import dispatch
from lowvram_kernels.errors import UnsupportedOpError


def test_dispatch_names_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_BACKEND", "triton")
    with pytest.raises(
        UnsupportedOpError, match="no backend can run attention_int8: triton: no Triton kernel"
    ):
        dispatch.choose("attention_int8")
    monkeypatch.setenv("LOWVRAM_BACKEND", "cublas")
    with pytest.raises(UnsupportedOpError, match="use one of reference, triton"):
        dispatch.choose("attention_int8")
    monkeypatch.setenv("LOWVRAM_BACKEND", "reference")
    assert dispatch.choose("attention_int8") is dispatch.OPS["attention_int8"].reference
    with pytest.raises(UnsupportedOpError, match="unknown op 'softmax'"):
        dispatch.choose("softmax")
