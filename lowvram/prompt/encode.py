"""Text features of the prompt and the negative prompt, from the disk cache or by running the
streamed text encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from lowvram.models.umt5 import TextEncoder
from lowvram.models.wan import compute_dtype
from lowvram.planner.umt5 import TOKENIZER_BYTES
from lowvram.progress import PhaseClock
from lowvram.prompt.cache import PromptCache, features_key
from lowvram.prompt.tokenizer import tokenize
from lowvram.request import Request
from lowvram.run import Run
from lowvram.store.reader import Store
from lowvram.streaming.stream import Buffers

RING_SLOTS = 2
_log = logging.getLogger(__name__)


def prompt_features(run: Run, cache: PromptCache | None) -> list[Tensor]:
    """Features of the prompt and the negative prompt, [L, d_model] each, on the CPU.

    Prompts missing in `cache` are encoded together and added to it; None disables caching. Reports
    the blocks of the text encoder as progress of the text phase.
    """
    clock = PhaseClock(run.listener, "text", run.store.config.text_encoder.num_layers)
    config, dtype = run.store.config.text_encoder, compute_dtype(run.store.format)
    prompts = _token_ids(run.store, run.request)
    hashes = run.store.manifest.components["text_encoder"].tensors
    keys = [features_key(hashes, config, ids, dtype, run.device) for ids in prompts]
    features = [
        None if cache is None else cache.load(key, (len(ids), config.d_model), dtype)
        for key, ids in zip(keys, prompts, strict=True)
    ]
    missing = [number for number, rows in enumerate(features) if rows is None]
    if missing:
        encoded = _encode(run, [prompts[number] for number in missing], clock.report)
        for number, rows in zip(missing, encoded, strict=True):
            features[number] = rows
            if cache is not None:
                cache.save(keys[number], rows)
    else:
        clock.report(config.num_layers)
    return [rows for rows in features if rows is not None]


def prompt_tokens(store: Store, request: Request) -> dict[str, dict[str, int]]:
    """Token counts of both prompts, as JSON values: `{"prompt": {"tokens": n, "kept": m}, …}`.

    tokens: including the end token; kept: those that the model reads, at most its `text_len`.
    """
    limit = store.config.dit.text_len
    counts = {
        name.replace(" ", "_"): len(_tokenized(store, text))
        for name, text in _prompts(request).items()
    }
    return {name: {"tokens": tokens, "kept": min(tokens, limit)} for name, tokens in counts.items()}


def _prompts(request: Request) -> dict[str, str]:
    return {"prompt": request.prompt, "negative prompt": request.negative_prompt}


def _token_ids(store: Store, request: Request) -> list[list[int]]:
    """Token ids of both prompts, cut to the model's `text_len`, with a warning for each one cut."""
    limit = store.config.dit.text_len
    ids = []
    for name, text in _prompts(request).items():
        tokens = _tokenized(store, text)
        ids.append(tokens if len(tokens) <= limit else [*tokens[: limit - 1], tokens[-1]])
        if len(tokens) > limit:
            _log.warning(
                "the %s has %d tokens, but the model reads only %d: the rest is cut off",
                name,
                len(tokens),
                limit,
            )
    return ids


def _tokenized(store: Store, prompt: str) -> list[int]:
    """All token ids of a prompt, `</s>` last."""
    memory_bytes = store.config.text_encoder.vocab_size * TOKENIZER_BYTES
    return tokenize(store.tokenizer, prompt, memory_bytes)


def _encode(run: Run, prompts: list[list[int]], after_block: Callable[[int], None]) -> list[Tensor]:
    """Features [L, d_model] of each list of token ids, with the text encoder's blocks streamed."""
    config, file = run.store.config.text_encoder, run.store.files["text_encoder"]
    encoder = TextEncoder(config, compute_dtype(run.store.format), run.device)
    schedule = [("text_encoder", index) for index in range(config.num_layers)]
    ring, staging = (
        (1, min(1, run.plan.staging_buffers))
        if run.lean
        else (RING_SLOTS, run.plan.staging_buffers)
    )
    with run.stream(schedule, Buffers(run.plan.text_slot_bytes, 0, ring, 0, staging)) as streamer:
        norm = file.read("norm.weight")
        features = encoder.encode(
            prompts,
            lambda ids: file.read_rows("token_embedding.weight", ids),
            norm,
            streamer,
            after_block,
        )
    return [rows.cpu() for rows in features]
