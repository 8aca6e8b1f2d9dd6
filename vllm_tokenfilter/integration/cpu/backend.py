"""The backend TOKEN_FILTERING on CPU: vLLM's own, with another metadata builder, and layers that may skip attention.

What differs from vLLM is in the step's metadata, which `builder.TokenFilteringMetadataBuilder.build` makes.

Source: vllm/v1/attention/backends/cpu_attn.py.
"""

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from vllm_tokenfilter.integration.cpu.builder import TokenFilteringMetadataBuilder
from vllm_tokenfilter.integration.lifecycle import PlanningImpl
from vllm_tokenfilter.integration.registration import BACKEND_NAME


class TokenFilteringBackend(CPUAttentionBackend):
    """CPU_ATTN that reads, for each request, only the tokens its layers still store."""

    @staticmethod
    def get_name() -> str:
        """The name layers report."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type["TokenFilteringImpl"]:
        """The per-layer implementation."""
        return TokenFilteringImpl

    @staticmethod
    def get_builder_cls() -> type[TokenFilteringMetadataBuilder]:
        """The per-step metadata builder."""
        return TokenFilteringMetadataBuilder


class TokenFilteringImpl(PlanningImpl, CPUAttentionBackendImpl):
    """The stock implementation; a layer may skip attention."""

    inner_name = CPUAttentionBackend.get_name()
    #: Index of the layer in the model if it skips attention, else None. Set by the metadata builder.
    skips: int | None = None

    def forward(
        self,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See `CPUAttentionBackendImpl.forward`."""
        # Called in every layer of a step, whose caches hold keys and values by then: no line here is cheap.
        stock = super().forward
        if self.skips is None or (skip := getattr(attn_metadata, "skip", None)) is None:
            return stock(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        skip.forward(
            self.skips,
            lambda metadata: stock(layer, query, key, value, kv_cache, metadata, output, *args, **kwargs),
            attn_metadata,
            query,
            output,
            self.scale,
            self.logits_soft_cap,
        )
        return output
