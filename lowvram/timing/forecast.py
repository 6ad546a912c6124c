"""Predicted seconds of a plan: computing times of its blocks in a simulation of the streamer. No
torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lowvram_kernels.sizes import KEY_TILE

from lowvram.hardware.profile import MachineProfile
from lowvram.planner.phases import PlanChoice
from lowvram.planner.plan import CHUNK_TOKENS, MemoryPlan
from lowvram.planner.prediction import Prediction
from lowvram.request import Workload
from lowvram.sigmas import high_noise_steps
from lowvram.store.layout import component_layout
from lowvram.streaming.schedule import BlockId, assign_slots
from lowvram.timing.predict import block_seconds, decode_seconds, text_seconds
from lowvram.timing.simulate import HopSpeeds, Timeline, simulate
from lowvram.variants import EXPERTS

# Steps of each part of a run that are simulated; the others repeat the last of them.
SIMULATED_STEPS = 3


class _Part(NamedTuple):
    """Successive steps of one expert (its number) in the same arithmetic."""

    expert: int
    refined: bool
    steps: int

    @property
    def simulated(self) -> int:
        """The steps that are simulated; the others take as long as the last of them."""
        return min(self.steps, SIMULATED_STEPS)


def _parts(high: int, low: int, refine_steps: int) -> list[_Part]:
    """The parts of a run, in order, each of at least one step."""
    refined_low = min(low, refine_steps)
    refined_high = refine_steps - refined_low
    parts = [
        _Part(0, False, high - refined_high),
        _Part(0, True, refined_high),
        _Part(1, False, low - refined_low),
        _Part(1, True, refined_low),
    ]
    return [part for part in parts if part.steps]


class Forecast:
    """Predicts the plans of one workload on one machine; the clock of `planner.choose.choose_plan`.

    A prediction is None if the rates of the workload's format are unknown.
    """

    def __init__(self, workload: Workload, profile: MachineProfile) -> None:
        high = high_noise_steps(workload.steps, workload.shift, workload.boundary)
        self._workload, self._profile = workload, profile
        self._parts = _parts(high, workload.steps - high, workload.refine_steps)
        self._branches = workload.branches
        self._block_s: dict[tuple[int, int, bool], float | None] = {}
        expert, text = (
            component_layout(name, workload.config, workload.format.name)
            for name in (EXPERTS[0], "text_encoder")
        )
        self._rest_bytes = 2 * sum(tensor.nbytes for tensor in expert.rest)
        self._text_parameters = sum(
            math.prod(tensor.shape) for tensor in text.blocks[0] if tensor.name.endswith(".weight")
        )

    @property
    def pinned_limit_bytes(self) -> int:
        """Host memory that may be page-locked."""
        return self._profile.pinned_limit_bytes

    def speeds(self, staged: bool) -> HopSpeeds:
        """Rates of the hops. staged: blocks pass through staging buffers."""
        profile = self._profile
        return HopSpeeds(
            profile.disk_bytes_s, profile.host_copy_bytes_s, profile.link_bytes_s, staged
        )

    def __call__(self, plan: MemoryPlan) -> Prediction | None:
        """None where the machine's profile has no rate for the plan's format."""
        tokens, chunk = plan.workload.num_tokens, plan.choice.chunk_tokens
        longest_chunk = min(CHUNK_TOKENS[0], -(-tokens // KEY_TILE) * KEY_TILE)
        longest = max(range(len(self._parts)), key=lambda number: self._parts[number].steps)
        block_s = self._block_seconds(tokens, chunk, False)
        unbounded_s = self._block_seconds(tokens, longest_chunk, self._parts[longest].refined)
        found = [self._block_seconds(tokens, chunk, part.refined) for part in self._parts]
        of_parts = [seconds for seconds in found if seconds is not None]
        if block_s is None or unbounded_s is None or len(of_parts) < len(found):
            return None
        timeline, lengths = self._timeline(plan, of_parts)
        ends = [timeline.visits[last].compute_end_s for last in _running(lengths)]
        durations = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
        last = _running([part.simulated for part in self._parts])  # simulated step of each part
        moved = self._bytes(plan, timeline, lengths, last)
        return Prediction(
            machine=self._profile.name,
            basis=self._profile.basis,
            block_s=block_s,
            step_s=durations[last[longest]],
            compute_step_s=of_parts[longest]
            * plan.num_blocks
            * self._branches[self._parts[longest].expert],
            compute_s=plan.num_blocks
            * sum(
                seconds * part.steps * self._branches[part.expert]
                for seconds, part in zip(of_parts, self._parts, strict=True)
            ),
            resident_step_s=unbounded_s
            * plan.num_blocks
            * self._branches[self._parts[longest].expert],
            switch_stall_s=self._switch_seconds(durations, last),
            text_s=self._text_seconds(plan),
            conditioning_s=self._rest_bytes
            * (1 / self._profile.disk_bytes_s + 1 / self._profile.link_bytes_s),
            denoise_s=sum(durations)
            + sum(
                (part.steps - part.simulated) * durations[step]
                for part, step in zip(self._parts, last, strict=True)
            ),
            decode_s=decode_seconds(plan.workload, plan.vae_tile_pixels, self._profile),
            read_bytes=moved[0],
            host_copy_bytes=moved[1],
            link_bytes=moved[2],
        )

    def _switch_seconds(self, durations: list[float], last: list[int]) -> float:
        """How much longer the low-noise expert's first step takes than its others."""
        low = next((n for n, part in enumerate(self._parts) if part.expert == 1), 0)
        return max(0.0, durations[last[low - 1] + 1] - durations[last[low]]) if low else 0.0

    def _block_seconds(self, num_tokens: int, chunk_tokens: int, refined: bool) -> float | None:
        """`predict.block_seconds`, computed once for the same arguments."""
        key = num_tokens, chunk_tokens, refined
        if key not in self._block_s:
            self._block_s[key] = block_seconds(
                self._workload.config.dit,
                self._workload.format,
                num_tokens,
                chunk_tokens,
                self._profile,
                refined,
            )
        return self._block_s[key]

    def _timeline(self, plan: MemoryPlan, of_parts: list[float]) -> tuple[Timeline, list[int]]:
        """The simulated first steps of each part, and the number of visits in each step.

        of_parts: seconds of a block in each part.
        """
        schedule: list[BlockId] = []
        compute_s: list[float] = []
        lengths: list[int] = []
        for part, block_s in zip(self._parts, of_parts, strict=True):
            branches = self._branches[part.expert]
            rounds, shared = (1, branches) if plan.choice.joint_guidance else (branches, 1)
            for _ in range(part.simulated):
                schedule += [
                    (EXPERTS[part.expert], index)
                    for _ in range(rounds)
                    for index in range(plan.num_blocks)
                ]
                compute_s += [block_s * shared] * (rounds * plan.num_blocks)
                lengths.append(rounds * plan.num_blocks)
        speeds = self.speeds(plan.staging_buffers > 0)
        timeline = simulate_choice(
            schedule, plan.choice, plan.slot_bytes, compute_s, speeds, plan.staging_buffers, lengths
        )
        return timeline, lengths

    def _bytes(
        self, plan: MemoryPlan, timeline: Timeline, lengths: list[int], last: list[int]
    ) -> tuple[int, int, int]:
        """Bytes (read, copied within the host, sent over the link) of all steps. Steps that are not
        simulated count like the last simulated one of their part, `last`.
        """
        total = [timeline.read_bytes, timeline.host_copy_bytes, timeline.link_bytes]
        ends = [0, *(end + 1 for end in _running(lengths))]
        for part, step in zip(self._parts, last, strict=True):
            count = part.steps - part.simulated
            if count:
                times = timeline.visits[ends[step] : ends[step + 1]]
                moved = (
                    sum(visit.read_end_s > visit.read_start_s for visit in times),
                    sum(visit.stage_end_s > visit.stage_start_s for visit in times),
                    sum(visit.copy_end_s > visit.copy_start_s for visit in times),
                )
                total = [
                    amount + count * blocks * plan.slot_bytes
                    for amount, blocks in zip(total, moved, strict=True)
                ]
        return total[0], total[1], total[2]

    def _text_seconds(self, plan: MemoryPlan) -> float:
        """Seconds for two prompts of full length through the encoder, with its blocks read from
        disk.
        """
        text = self._workload.config.text_encoder
        tokens = max(self._branches) * self._workload.config.dit.text_len
        compute_s = text_seconds(
            text, self._workload.format, tokens, self._text_parameters, self._profile
        )
        visits = assign_slots(
            [("text_encoder", index) for index in range(text.num_layers)],
            0,
            2,
            0,
            plan.staging_buffers,
        )
        return simulate(
            visits, plan.text_slot_bytes, compute_s, self.speeds(plan.staging_buffers > 0)
        ).seconds


def simulate_choice(
    schedule: Sequence[BlockId],
    choice: PlanChoice,
    block_bytes: int,
    compute_s: float | Sequence[float],
    speeds: HopSpeeds,
    staging_buffers: int = 2,
    step_lengths: Sequence[int] = (),
) -> Timeline:
    """Simulate a schedule under a choice. step_lengths: visits of each step; the host waits at the
    end of each step.
    """
    pinned = range(choice.pinned_blocks)
    visits = assign_slots(
        schedule,
        choice.resident_blocks,
        choice.ring_slots,
        choice.host_blocks,
        staging_buffers,
        pinned,
    )
    return simulate(
        visits,
        block_bytes,
        compute_s,
        speeds,
        frozenset(last + 1 for last in _running(step_lengths)),
    )


def _running(lengths: Sequence[int]) -> list[int]:
    """Index of the last visit of each step."""
    ends, total = [], -1
    for length in lengths:
        total += length
        ends.append(total)
    return ends
