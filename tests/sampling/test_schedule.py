"""The grid against the integer lists and sigmas of the official scheduler (spec section 5.1)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowvram.errors import UsageError
from lowvram.request import SOLVERS
from lowvram.sampling.schedule import make_schedule, unipc_grid
from lowvram.sigmas import expert_of

T2V = """999 997 995 993 990 988 985 982 979 976 972 969 965 961 956 952 947 941 936 929 922 915 907 898 888 877 865 852 837 819 799 776
    749 717 678 631 571 492 386 235"""
I2V = """999 994 989 983 978 972 965 959 952 944 937 929 920 911 902 892 882 870 859 846 833 818 803 786 768 749 728 706 681 654 624 591
    555 514 468 416 356 288 208 113"""
TI2V = """999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 854 843 833 821 809 796 783 768 753
    737 720 701 681 660 636 611 584 555 522 487 448 405 356 302 241 172 92"""


@pytest.mark.parametrize(
    ("shift", "steps", "expected"),
    [(12.0, 40, T2V), (5.0, 40, I2V), (5.0, 50, TI2V)],
    ids=["t2v", "i2v", "ti2v"],
)
def test_timesteps_equal_the_official_integers(shift: float, steps: int, expected: str) -> None:
    schedule = unipc_grid(steps, shift)
    assert schedule.timesteps.tolist() == [int(word) for word in expected.split()]
    assert schedule.timesteps.dtype == torch.int64
    assert schedule.steps == steps


def test_timesteps_at_shift_3() -> None:
    timesteps = unipc_grid(40, 3.0).timesteps.tolist()
    assert timesteps[:3] == [999, 991, 982]
    assert timesteps[-3:] == [195, 136, 71]


@pytest.mark.parametrize(
    ("shift", "steps", "first", "second", "last"),
    [
        (12.0, 40, 0.999917, 0.997783, 0.235110),
        (5.0, 40, 0.999800, 0.994695, 0.113533),
        (5.0, 50, 0.999800, 0.995732, 0.092507),
    ],
)
def test_sigmas_equal_the_official_values(
    shift: float, steps: int, first: float, second: float, last: float
) -> None:
    sigmas = unipc_grid(steps, shift).sigmas
    assert sigmas.dtype == torch.float32
    assert len(sigmas) == steps + 1
    assert sigmas[-1] == 0
    assert [
        round(value, 6) for value in (sigmas[0].item(), sigmas[1].item(), sigmas[-2].item())
    ] == [first, second, last]


@pytest.mark.parametrize("steps", [1, 2, 7, 40, 1000])
def test_sigmas_equal_numpy_bit_for_bit(steps: int) -> None:
    line = np.linspace(0.9990000128746033, 0, steps + 1)[:-1]
    sigmas = 12.0 * line / (1 + 11.0 * line)
    schedule = unipc_grid(steps, 12.0)
    assert torch.equal(schedule.sigmas[:-1], torch.from_numpy(sigmas.astype(np.float32)))
    assert torch.equal(schedule.timesteps, torch.from_numpy(sigmas * 1000).to(torch.int64))


@pytest.mark.parametrize(
    ("shift", "boundary", "high"),
    [(12.0, 0.875, 26), (5.0, 0.9, 15), (3.0, 0.9, 10)],
    ids=["t2v", "i2v", "i2v-480p"],
)
def test_expert_switches_once_at_the_boundary(shift: float, boundary: float, high: int) -> None:
    experts = [expert_of(t, boundary) for t in unipc_grid(40, shift).timesteps.tolist()]
    assert experts == ["high_noise"] * high + ["low_noise"] * (40 - high)


def test_expert_at_the_boundary_is_the_high_one() -> None:
    assert [expert_of(t, 0.875) for t in (876, 875, 874)] == [
        "high_noise",
        "high_noise",
        "low_noise",
    ]


@pytest.mark.parametrize(("steps", "shift"), [(0, 12.0), (40, 1e9), (40, 1e-44), (20_000, 1e3)])
def test_a_schedule_that_no_solver_survives_is_refused(steps: int, shift: float) -> None:
    with pytest.raises(UsageError, match="steps"):
        unipc_grid(steps, shift)


def test_each_solver_has_its_grid() -> None:
    for solver in SOLVERS:
        assert torch.equal(make_schedule(solver, 7, 5.0).sigmas, unipc_grid(7, 5.0).sigmas)
    with pytest.raises(UsageError, match="unipc, euler"):
        make_schedule("heun", 7, 5.0)
