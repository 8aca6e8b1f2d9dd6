"""A load that stock vLLM cannot hold in the same memory, held to the reference."""

import pytest

from tests import reference
from tests.engine.driver import Engine, check


@pytest.mark.slow
def test_a_load_that_stock_vllm_cannot_hold_equals_the_reference(embedded, tokens):
    """32 requests of 1500 tokens and 500 more, where stock vLLM has room for 17; every fourth is compared."""
    monkeypatch = pytest.MonkeyPatch()
    engine = Engine(
        monkeypatch,
        embedded.path,
        {"pruning_ratio": 0.5},
        max_model_len=8192,
        max_num_seqs=32,
        kv_cache_memory_bytes=1071 * embedded.block_bytes,
        disable_log_stats=False,
    )
    engine.settings = reference.Settings(ratio=0.5)
    names = [f"load{i}." for i in range(32)]
    for i, name in enumerate(names):
        engine.add(name, tokens[i * 61 : i * 61 + 1500], 500)
    engine.drain()
    metrics = {metric.name: metric.value for metric in engine.llm.get_metrics() if hasattr(metric, "value")}
    assert metrics["vllm:num_preemptions"] == 0
    check(engine, embedded.model, names[::4])
    engine.close()
    monkeypatch.undo()
