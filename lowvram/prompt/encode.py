"""The features of both prompts: from the cache on disk, else from the text encoder, whose blocks
stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from lowvram.memory.malloc import trim_heap
from lowvram.models.umt5 import TextEncoder
from lowvram.models.wan import compute_dtype
from lowvram.progress import PhaseClock
from lowvram.prompt.cache import PromptCache, features_key
from lowvram.prompt.tokenizer import Tokenizer
from lowvram.request import Request
from lowvram.run import Run
from lowvram.store.reader import Store
from lowvram.streaming.stream import Buffers

RING_SLOTS = 2
_log = logging.getLogger(__name__)


def prompt_features(run: Run, cache: PromptCache | None) -> list[Tensor]:
    """Features of the prompt and the negative prompt, [L, d_model] each, on the host."""
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
        for number, rows in zip(
            missing,
            _encode(run, [prompts[number] for number in missing], clock.report),
            strict=True,
        ):
            features[number] = rows
            if cache is not None:
                cache.save(keys[number], rows)
    else:
        clock.report(config.num_layers)
    return [rows for rows in features if rows is not None]


def prompt_tokens(store: Store, request: Request) -> dict[str, dict[str, int]]:
    """`tokens` of each prompt, its end included, and how many of them are `kept`: no model reads
    more than its `text_len`.
    """
    tokenizer, limit = Tokenizer(store.tokenizer), store.config.dit.text_len
    counts = {
        name.replace(" ", "_"): tokenizer.length(text) for name, text in _prompts(request).items()
    }
    return {name: {"tokens": tokens, "kept": min(tokens, limit)} for name, tokens in counts.items()}


def _prompts(request: Request) -> dict[str, str]:
    return {"prompt": request.prompt, "negative prompt": request.negative_prompt}


def _token_ids(store: Store, request: Request) -> list[list[int]]:
    """Ids of the prompt and the negative prompt; a warning for each that is longer than the model
    reads.
    """
    tokenizer, limit = Tokenizer(store.tokenizer), store.config.dit.text_len
    ids = []
    for name, text in _prompts(request).items():
        ids.append(tokenizer.encode(text, limit))
        tokens = tokenizer.length(text)
        if tokens > limit:
            _log.warning(
                "the %s has %d tokens, the model reads %d of them: what follows is cut off",
                name,
                tokens,
                limit,
            )
    del tokenizer
    trim_heap()
    return ids


def _encode(run: Run, prompts: list[list[int]], after_block: Callable[[int], None]) -> list[Tensor]:
    config, file = run.store.config.text_encoder, run.store.files["text_encoder"]
    encoder = TextEncoder(config, compute_dtype(run.store.format), run.device)
    schedule = [("text_encoder", index) for index in range(config.num_layers)]
    ring, staging = (
        (1, min(1, run.plan.staging_buffers))
        if run.lean
        else (RING_SLOTS, run.plan.staging_buffers)
    )
    with run.stream(schedule, Buffers(run.plan.text_slot_bytes, 0, ring, 0, staging)) as streamer:
        embed, norm = (
            (lambda ids: file.read_rows("token_embedding.weight", ids)),
            file.read("norm.weight"),
        )
        features = encoder.encode(prompts, embed, norm, streamer, after_block)
    return [rows.cpu() for rows in features]
