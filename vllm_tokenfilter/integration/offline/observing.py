"""Watches one sequence go through a `ScoringEngine`: what every layer caches of it, and what every seal keeps.

Used by `vllm-tokenfilter inspect`; nothing of it runs in service.

Source: vllm/model_executor/layers/attention/attention.py (`unified_kv_cache_update`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_tokenfilter.integration.cpu.sealing import SealedChunks
from vllm_tokenfilter.integration.layers import layers_by_index
from vllm_tokenfilter.integration.offline.scoring import Consumer, ScoringEngine


@dataclass
class Observation:
    """One sequence as a filtered engine saw it."""

    #: Layer index -> float32 [num_kv_heads, num_tokens, head_size], as cached (after RoPE).
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)  #: layer index -> float32, same shape.
    #: Layer index -> bool [num_sealed_tokens], for filtered layers: which positions stayed.
    kept: dict[int, NDArray[np.bool_]] = field(default_factory=dict)


def observe(engine: ScoringEngine, tokens: list[int], step_tokens: int, consumer: Consumer) -> Observation:
    """Feed one sequence with the filter in force, watching; see `ScoringEngine.feed`.

    What the last step makes due is sealed too: the next token would not see it.
    """
    rows: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    kept: dict[int, list[NDArray[np.bool_]]] = {}

    def saw_seal(sealed: SealedChunks) -> None:
        for layer, chunks in zip(sealed.layer_indices, sealed.kept, strict=True):
            for offsets in chunks:
                stays = np.zeros(chunk_size, bool)
                stays[offsets] = True
                kept.setdefault(layer, []).append(stays)

    builders = engine.builders()
    for builder in builders:
        builder.seal_due()  # what another sequence left
    chunk_size = builders[0].config.chunk_size
    try:
        for builder in builders:
            builder.observer = saw_seal
        with _watched_writes(builders[0].vllm_config, rows):
            engine.feed([tokens], step_tokens, consumer)
        for builder in builders:
            builder.seal_due()
    finally:
        for builder in builders:
            builder.observer = None
    keys, values = (
        {layer: torch.cat(both[part]).transpose(0, 1).contiguous() for layer, both in sorted(rows.items())}
        for part in (0, 1)
    )
    assert all(key.shape[1] == len(tokens) for key in keys.values())
    return Observation(keys, values, {layer: np.concatenate(chunks) for layer, chunks in kept.items()})


@contextmanager
def _watched_writes(vllm_config: Any, rows: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]]) -> Iterator[None]:
    """Copy what each layer writes into its cache, [num_tokens, num_kv_heads, head_size] a step, into `rows`."""
    layers = layers_by_index(vllm_config)
    layers = {index: layer for index, layer in layers.items() if layer.kv_sharing_target_layer_name is None}

    def watched(index: int, original: Any) -> Any:
        def update(layer: Any, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            written = rows.setdefault(index, ([], []))
            written[0].append(key.float().clone())
            written[1].append(value.float().clone())
            original(layer, key, value, *args, **kwargs)

        return update

    for index, layer in layers.items():
        layer.impl.do_kv_cache_update = watched(index, layer.impl.do_kv_cache_update)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.impl.do_kv_cache_update
