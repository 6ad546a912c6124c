"""The rotation of activations against the dense Hadamard matrix."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.hadamard import rotate
from lowvram_quantize.rotate import rotate as rotate_weights

from tests.kernels.inputs import dense_rotation, random


def test_rotation_is_the_dense_hadamard_and_its_own_inverse() -> None:
    x = random(7, 512)
    dense = (x.double().view(7, 2, 256) @ dense_rotation()).view(7, 512)
    assert torch.allclose(rotate(x).double(), dense, atol=1e-5)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-5)
    with pytest.raises(UnsupportedOpError, match="multiple of 256"):
        rotate(random(2, 100))


def test_activations_and_weights_are_rotated_alike() -> None:
    x = random(5, 768)
    assert torch.allclose(rotate(x), rotate_weights(x.clone()), atol=1e-6)
