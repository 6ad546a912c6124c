"""Predicted seconds of a plan: computing times of its blocks in a simulation of the streamer. No
torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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

# Steps of each expert that are simulated; the others repeat the last of them.
SIMULATED_STEPS = 3


class Forecast:
    """Predicts the plans of one workload on one machine; the clock of `planner.choose.choose_plan`.

    A prediction is None if the rates of the workload's format are unknown.
    """

    def __init__(self, workload: Workload, profile: MachineProfile) -> None:
        high = high_noise_steps(workload.steps, workload.shift, workload.boundary)
        self._workload, self._profile = workload, profile
        self._steps, self._branches = (high, workload.steps - high), workload.branches
        self._block_s: dict[tuple[int, int], float | None] = {}
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
        block_s = self._block_seconds(plan.workload.num_tokens, plan.choice.chunk_tokens)
        longest_chunk = min(CHUNK_TOKENS[0], -(-plan.workload.num_tokens // KEY_TILE) * KEY_TILE)
        unbounded_s = self._block_seconds(plan.workload.num_tokens, longest_chunk)
        if block_s is None or unbounded_s is None:
            return None
        steps = [min(count, SIMULATED_STEPS) for count in self._steps]
        timeline, lengths = self._timeline(plan, block_s, steps)
        ends = [timeline.visits[last].compute_end_s for last in _running(lengths)]
        durations = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
        repeated = [
            0 if not count else count - done for count, done in zip(self._steps, steps, strict=True)
        ]
        steady = [durations[steps[0] - 1] if steps[0] else 0.0, durations[-1] if steps[1] else 0.0]
        denoise_s = sum(durations) + sum(
            count * seconds for count, seconds in zip(repeated, steady, strict=True)
        )
        longest = max(range(2), key=lambda expert: self._steps[expert])
        moved = self._bytes(plan, timeline, lengths, steps, repeated)
        switch_s = max(0.0, durations[steps[0]] - steady[1]) if all(steps) else 0.0
        return Prediction(
            machine=self._profile.name,
            basis=self._profile.basis,
            block_s=block_s,
            step_s=steady[longest],
            compute_step_s=block_s * plan.num_blocks * self._branches[longest],
            compute_s=block_s
            * plan.num_blocks
            * sum(
                count * branches
                for count, branches in zip(self._steps, self._branches, strict=True)
            ),
            resident_step_s=unbounded_s * plan.num_blocks * self._branches[longest],
            switch_stall_s=switch_s,
            text_s=self._text_seconds(plan),
            conditioning_s=self._rest_bytes
            * (1 / self._profile.disk_bytes_s + 1 / self._profile.link_bytes_s),
            denoise_s=denoise_s,
            decode_s=decode_seconds(plan.workload, plan.vae_tile_pixels, self._profile),
            read_bytes=moved[0],
            host_copy_bytes=moved[1],
            link_bytes=moved[2],
        )

    def _block_seconds(self, num_tokens: int, chunk_tokens: int) -> float | None:
        """`predict.block_seconds`, computed once for each pair."""
        key = num_tokens, chunk_tokens
        if key not in self._block_s:
            self._block_s[key] = block_seconds(
                self._workload.config.dit, self._workload.format, *key, self._profile
            )
        return self._block_s[key]

    def _timeline(
        self, plan: MemoryPlan, block_s: float, steps: Sequence[int]
    ) -> tuple[Timeline, list[int]]:
        """The simulated first steps of each expert, and the number of visits in each step."""
        schedule: list[BlockId] = []
        compute_s: list[float] = []
        lengths: list[int] = []
        for expert, count, branches in zip(EXPERTS, steps, self._branches, strict=True):
            rounds, shared = (1, branches) if plan.choice.joint_guidance else (branches, 1)
            for _ in range(count):
                schedule += [
                    (expert, index) for _ in range(rounds) for index in range(plan.num_blocks)
                ]
                compute_s += [block_s * shared] * (rounds * plan.num_blocks)
                lengths.append(rounds * plan.num_blocks)
        speeds = self.speeds(plan.staging_buffers > 0)
        timeline = simulate_choice(
            schedule, plan.choice, plan.slot_bytes, compute_s, speeds, plan.staging_buffers, lengths
        )
        return timeline, lengths

    def _bytes(
        self,
        plan: MemoryPlan,
        timeline: Timeline,
        lengths: list[int],
        steps: list[int],
        repeated: list[int],
    ) -> tuple[int, int, int]:
        """Bytes (read, copied within the host, sent over the link) of all steps. Steps that are not
        simulated count like the last simulated one of their expert.
        """
        total = [timeline.read_bytes, timeline.host_copy_bytes, timeline.link_bytes]
        ends = [0, *(last + 1 for last in _running(lengths))]
        for count, last in zip(repeated, (steps[0] - 1, len(lengths) - 1), strict=True):
            if count:
                times = timeline.visits[ends[last] : ends[last + 1]]
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
        compute_s = text_seconds(text, tokens, self._text_parameters, self._profile)
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
