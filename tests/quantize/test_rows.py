"""Tests rotation, int8 and fp8 against independent formulas.

Also checks that the results do not depend on chunks and threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lowvram_quantize import rows
from lowvram_quantize.fp8 import quantize_fp8
from lowvram_quantize.int8 import dequantize_int8, quantize_int8
from lowvram_quantize.rotate import rotate, rotation_matrix
from lowvram_quantize.rows import (
    SMALLEST_SCALE,
    ErrorSums,
    RowEngine,
    cast_rows,
    count_nonfinite,
    row_scales,
)

from lowvram.errors import NonFiniteError


@pytest.fixture
def engine() -> Iterator[RowEngine]:
    with RowEngine(1) as engine:
        yield engine


def random_weight(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(
        outputs, inputs, generator=torch.Generator().manual_seed(outputs * 7 + inputs)
    )
    weight[:, 3] *= 30  # an outlier channel
    return weight.to(dtype)


def test_rotation_matrix_is_the_regular_hadamard_matrix() -> None:
    matrix = rotation_matrix()
    h4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    expected = np.kron(np.kron(h4, h4), np.kron(h4, h4)) / 16
    assert np.array_equal(matrix.numpy(), expected)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, torch.eye(256))
    assert np.array_equal(expected.sum(0), np.ones(256))  # regular: every row and column sums to 1


def test_rotate_is_the_product_with_the_dense_matrix() -> None:
    x = random_weight(5, 768)
    expected = (x.double().view(-1, 256) @ rotation_matrix().double()).view_as(x)
    assert (rotate(x) - expected).abs().max() < 1e-5 * x.abs().max()


def test_rotate_is_exact_on_integers_and_its_own_inverse() -> None:
    x = torch.randint(-1000, 1000, (4, 512), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(rotate(x), (x.view(-1, 256) @ rotation_matrix()).view_as(x))
    assert torch.equal(rotate(rotate(x)), x)


def test_rotate_leaves_its_input() -> None:
    x = random_weight(2, 256)
    before = x.clone()
    rotate(x)
    assert torch.equal(x, before)


def naive_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize to int8 one row at a time, in numpy fp32."""
    codes, scales = np.empty(weight.shape, np.int8), np.empty((len(weight), 1), np.float32)
    for index, row in enumerate(weight):
        scales[index] = max(
            np.float32(np.abs(row).max()) / np.float32(127), np.finfo(np.float32).tiny
        )
        codes[index] = np.clip(np.rint(row / scales[index]), -127, 127)
    return codes, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 256), (7, 512), (65, 768)])
@pytest.mark.parametrize("rotated", [True, False])
def test_int8_is_the_naive_formula(
    outputs: int, inputs: int, dtype: torch.dtype, rotated: bool, engine: RowEngine
) -> None:
    weight = random_weight(outputs, inputs, dtype)
    codes, scales, _ = quantize_int8(weight, engine, rotated)
    values = rotate(weight.float()) if rotated else weight.float()
    expected_codes, expected_scales = naive_int8(values.numpy())
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert np.array_equal(scales.numpy(), expected_scales)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert (dequantize_int8(codes, scales) - values).abs().max() <= scales.max() * 0.501


def test_int8_rounds_half_to_even(engine: RowEngine) -> None:
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, -127.0]])
    codes, scales, _ = quantize_int8(row, engine, rotated=False)
    assert scales.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -126, -127]]


def e4m3_values() -> np.ndarray:
    """Return all finite non-negative values of e4m3fn from its definition.

    4 bits of exponent with bias 7, 3 bits of mantissa; 0x7f is NaN.
    """
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )


def naive_fp8(quotients: np.ndarray) -> np.ndarray:
    """Return the code of the nearest value, the even code in a tie."""
    values = e4m3_values()
    distance = np.abs(np.abs(quotients.astype(np.float64))[..., None] - values)
    odd = np.arange(127) & 1
    best = np.lexsort((np.broadcast_to(odd, distance.shape), distance), axis=-1)[..., 0]
    return (best | np.where(np.signbit(quotients), 0x80, 0)).astype(np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_the_naive_formula(dtype: torch.dtype, engine: RowEngine) -> None:
    weight = random_weight(9, 256, dtype)
    codes, scales, _ = quantize_fp8(weight, engine)
    values = weight.float().numpy()
    expected_scales = np.abs(values).max(1, keepdims=True) / np.float32(448)
    assert codes.dtype == torch.float8_e4m3fn
    assert np.array_equal(scales.numpy(), expected_scales)
    assert np.array_equal(codes.view(torch.uint8).numpy(), naive_fp8(values / expected_scales))


def test_fp8_ties_go_to_even_and_the_largest_saturates(engine: RowEngine) -> None:
    row = torch.tensor([[448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, -447.9]])
    codes, scales, _ = quantize_fp8(row, engine)
    assert scales.item() == 1.0
    assert codes.float().tolist() == [[448.0, 16.0, 20.0, 0.0, 2.0**-8, -448.0]]


def test_fp8_never_makes_nan(engine: RowEngine) -> None:
    weight = random_weight(400, 256) * torch.logspace(-30, 30, 400)[:, None]
    codes, _, _ = quantize_fp8(weight, engine)
    assert torch.isfinite(codes.float()).all()


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_fp8])
def test_p08_a_zero_row_gets_a_finite_scale(quantize: object, engine: RowEngine) -> None:
    weight = random_weight(3, 256)
    weight[1] = 0
    weight[2] *= 1e-44  # absmax / 127 would be 0
    codes, scales, error = quantize(weight, engine)  # type: ignore[operator]
    assert torch.isfinite(scales).all()
    assert scales[1].item() == SMALLEST_SCALE
    assert (scales > 0).all()
    assert not codes[1].float().any()
    assert math.isfinite(error.noise)


def test_overflow_in_the_rotation_is_refused(engine: RowEngine) -> None:
    weight = torch.full((2, 256), 3e38)
    with pytest.raises(NonFiniteError, match="overflow"):
        quantize_int8(weight, engine)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunk_elements", [1, 5000, 2**19])
def test_p04_neither_chunks_nor_threads_change_a_bit(
    threads: int, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(61, 512)
    with RowEngine(1) as one:
        expected = [
            quantize_int8(weight, one),
            quantize_int8(weight, one, False),
            quantize_fp8(weight, one),
        ]
    # The default of `over_rows` is bound at definition, so change the default itself.
    monkeypatch.setattr(RowEngine.over_rows, "__defaults__", (chunk_elements,))
    with RowEngine(threads) as many:
        found = [
            quantize_int8(weight, many),
            quantize_int8(weight, many, False),
            quantize_fp8(weight, many),
        ]
        cast = cast_rows(many, weight, torch.bfloat16)[0]
    for (codes, scales, _), (other_codes, other_scales, _) in zip(expected, found, strict=True):
        assert torch.equal(codes.view(torch.uint8), other_codes.view(torch.uint8))
        assert torch.equal(scales, other_scales)
    assert torch.equal(cast, weight.to(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_p04_a_gpu_gives_the_bytes_of_a_cpu() -> None:
    weight = random_weight(512, 5120)
    with RowEngine(1) as cpu, RowEngine(1, "cuda") as gpu:
        for quantize in (quantize_int8, quantize_fp8):
            one, other = quantize(weight, cpu), quantize(weight, gpu)
            assert torch.equal(one[0].view(torch.uint8), other[0].view(torch.uint8))
            assert torch.equal(one[1], other[1])


def test_the_number_of_torch_threads_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    with RowEngine(2) as engine:
        quantize_int8(random_weight(8, 256), engine)
    assert torch.get_num_threads() == before


def test_errors_are_those_of_the_dequantized_weight(engine: RowEngine) -> None:
    weight = random_weight(33, 512)
    codes, scales, error = quantize_int8(weight, engine)
    values, restored = rotate(weight).double(), (codes.float() * scales).double()
    noise = ((restored - values) ** 2).sum()
    assert error.elements == weight.numel()
    assert error.sqnr_db == pytest.approx(10 * math.log10((values**2).sum() / noise), abs=1e-3)
    assert error.cosine == pytest.approx(
        torch.cosine_similarity(values.flatten(), restored.flatten(), dim=0).item(), abs=1e-6
    )
    assert error.largest == pytest.approx((restored - values).abs().max().item(), rel=1e-5)
    # The rotation is orthogonal, so the error in the rotated space equals that of the weight
    # rotated back.
    back = rotate(restored.float()).double() - weight.double()
    assert (back**2).sum().item() == pytest.approx(noise.item(), rel=1e-3)


def test_rotation_pays_where_there_are_outliers(engine: RowEngine) -> None:
    weight = random_weight(64, 1024)
    assert (
        quantize_int8(weight, engine, True)[2].sqnr_db
        > quantize_int8(weight, engine, False)[2].sqnr_db + 10
    )


def test_sums_of_nothing_lost_and_of_zeros() -> None:
    assert ErrorSums(4, 2.0, 0.0, 0.0, 0.0).sqnr_db == math.inf
    assert ErrorSums(4, 0.0, 0.0, 0.0, 0.0).cosine == 1.0
    assert ErrorSums(4, 0.0, 1.0, 0.0, 1.0).sqnr_db == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_p08_every_nonfinite_element_is_counted(
    bad: float, dtype: torch.dtype, engine: RowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 64)
    values = torch.ones(50, 33)
    assert count_nonfinite(engine, values.to(dtype)) == 0
    values[0, 0] = values[49, 32] = values[20, 5] = bad
    assert count_nonfinite(engine, values.to(dtype)) == 3
    assert count_nonfinite(engine, values.to(dtype)[:1]) == 1
    assert count_nonfinite(engine, torch.empty(0, 4)) == 0


def test_scales_of_one_row_keep_their_shape() -> None:
    from optimum.quanto import qint8

    assert row_scales(torch.tensor([[254.0]]), qint8).tolist() == [[2.0]]
