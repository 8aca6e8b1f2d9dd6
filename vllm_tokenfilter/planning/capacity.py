"""How many requests a KV cache holds, dense and filtered: vLLM's own start-up arithmetic, without vLLM.

vLLM sorts layers into KV-cache groups of equal width that draw blocks from one pool, and divides the pool by the
blocks that one request of the longest length needs. Our layers need blocks for their peak (`layout.peak_slots`).

Source: vllm/v1/core/kv_cache_*.py (`_get_kv_cache_groups_uniform_page_size`, `get_kv_cache_config_from_groups`,
`get_max_concurrency_for_kv_cache_config`); docs/memory.md.
"""

from collections import Counter
from dataclasses import dataclass

from vllm_tokenfilter.config import FilterConfig
from vllm_tokenfilter.errors import PlanError
from vllm_tokenfilter.layer_plan import LayerFacts, LayerPlan
from vllm_tokenfilter.layout import Layout, peak_slots, stored_tokens

#: With asynchronous scheduling, vLLM's default, two steps are in flight, and a windowed layer keeps room for both.
STEPS_IN_FLIGHT = 2


@dataclass(frozen=True)
class Shape:
    """A model as the KV cache sees it."""

    layers: tuple[LayerFacts, ...]  #: in order.
    num_kv_heads: int  #: of the whole model.
    head_size: int  #: elements of a key, and of a value.
    element_bytes: int  #: of one element of the cache.
    weight_bytes: int  #: of the whole model.

    def layer_token_bytes(self, tensor_parallel: int) -> int:
        """Bytes one layer keeps of one token on one rank; heads are copied where there are more ranks than heads."""
        return max(1, self.num_kv_heads // tensor_parallel) * self.head_size * 2 * self.element_bytes


@dataclass(frozen=True)
class Capacity:
    """What one KV cache holds; on each rank alike."""

    num_blocks: int  #: blocks of the pool.
    blocks_per_request: int  #: blocks of one request of the longest length at its peak, over all groups.
    max_concurrency: float  #: requests of the longest length that fit, as vLLM reports it at start.
    cache_tokens: int  #: `max_concurrency` times the longest length, as vLLM reports it.
    read_bytes: int  #: KV bytes, over all ranks, that one step of decoding reads for a request of the longest length.
    bytes_per_token: float  #: `read_bytes` divided by that length.


@dataclass(frozen=True)
class _Kept:
    """What one layer keeps of a request, see `LayerFacts` and `LayerRow`; layers that keep the same share groups."""

    kind: str
    window: int
    layout: Layout | None

    def blocks(self, context: int, block_size: int, step: int, in_flight: int) -> int:
        """Blocks a request of the longest length needs in one group of such layers."""
        if self.layout is not None:
            return _ceil(peak_slots(context, step, self.layout), block_size)
        if self.kind == "sliding":
            return _ceil(min(self.window - 1 + in_flight, context), block_size) + 1
        if self.kind == "chunked":
            return _ceil(min(self.window + in_flight, context), block_size)
        return _ceil(context, block_size)

    def read_tokens(self, context: int) -> int:
        """Tokens that one step of decoding reads."""
        if self.layout is not None:
            return int(stored_tokens(context, self.layout))
        if self.kind == "sliding":
            return min(self.window, context)
        if self.kind == "chunked":
            return context % self.window or min(self.window, context)
        return context


def kv_capacity(
    shape: Shape,
    config: FilterConfig | None,
    *,
    cache_bytes: int,
    context: int,
    block_size: int,
    max_step_tokens: int,
    tensor_parallel: int = 1,
    steps_in_flight: int = STEPS_IN_FLIGHT,
) -> Capacity:
    """What a KV cache holds.

    Args:
        shape: the model.
        config: our settings; None, or ratio 0, for stock vLLM.
        cache_bytes: of the KV cache, on one rank.
        context: the longest length of a request, vLLM's `max_model_len`.
        block_size: tokens of a block.
        max_step_tokens: the most tokens of a request that one step computes.
        tensor_parallel: ranks.
        steps_in_flight: steps that vLLM schedules ahead; matters to layers of a window alone.

    Raises:
        PlanError: the cache holds no request.
    """
    config = config or FilterConfig(pruning_ratio=0.0)
    plan = LayerPlan.of(config, len(shape.layers), dict(enumerate(shape.layers)))
    layers = [_Kept(facts.kind, facts.window, row.layout) for facts, row in zip(shape.layers, plan.rows, strict=True)]
    step = min(max_step_tokens, context)
    width, blocks_per_request = 0, 0
    for kept, (groups, widest) in _groups(Counter(layers)).items():
        blocks_per_request += groups * kept.blocks(context, block_size, step, steps_in_flight * max_step_tokens)
        width = max(width, widest)
    layer_bytes = shape.layer_token_bytes(tensor_parallel)
    num_blocks = cache_bytes // (layer_bytes * block_size * width)
    if num_blocks < blocks_per_request:
        raise PlanError(
            f"context={context} needs {blocks_per_request} blocks of {block_size} tokens a request, and the KV "
            f"cache ({cache_bytes / 2**30:.2f} GiB a rank) has {num_blocks}; use a shorter --context, more memory "
            "or a larger --tensor-parallel-size."
        )
    concurrency = num_blocks / blocks_per_request
    read = sum(kept.read_tokens(context) for kept in layers)
    ranks_bytes = layer_bytes * tensor_parallel
    return Capacity(
        num_blocks=num_blocks,
        blocks_per_request=blocks_per_request,
        max_concurrency=concurrency,
        cache_tokens=int(concurrency * context),
        read_bytes=read * ranks_bytes,
        bytes_per_token=read * ranks_bytes / context,
    )


def _groups(counts: Counter[_Kept]) -> dict[_Kept, tuple[int, int]]:
    """Number of groups and layers of the widest one, for each kind of layer, as vLLM forms them."""
    fewest, most = min(counts.values()), max(counts.values())
    size = most if most < 1.5 * fewest else fewest
    found = {}
    for key, count in counts.items():
        groups = _ceil(count, size)
        found[key] = (groups, _ceil(count, groups))
    return found


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit)
