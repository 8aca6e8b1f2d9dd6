"""A vLLM engine that scores given tokens with the visibility decoding has: the basis of every quality figure.

Scored in one prefill step, every token is still raw and the filter does nothing. Here each sequence is fed in steps of
at most `step_tokens`, so that a token sees what it would see had the text before it been decoded, up to one step.
The engine runs in this process: the last hidden states are taken where vLLM itself takes them for `prompt_logprobs`,
which keeps whole distributions within reach (the API returns only the likeliest tokens).

Source: vllm/v1/worker/gpu_model_runner.py (`_get_prompt_logprobs_dict`), vllm/v1/core/sched/scheduler.py
(`long_prefill_token_threshold`).
"""

import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vllm_tokenfilter.config import CONFIG_KEY, FilterConfig
from vllm_tokenfilter.errors import UnsupportedError
from vllm_tokenfilter.integration import refusals
from vllm_tokenfilter.integration.offline.mixed_layouts import MixedLayouts, OfflineBuilder
from vllm_tokenfilter.integration.registration import BACKEND_NAME
from vllm_tokenfilter.integration.status import Status
from vllm_tokenfilter.integration.worker import builders_of, status_of
from vllm_tokenfilter.planning.model_shape import kv_heads

#: Takes the index of a sequence, the position of its first token, and hidden states [num_tokens, hidden_size].
Consumer = Callable[[int, int, torch.Tensor], None]


class ScoringEngine:
    """One engine whose filter can be set anew between calls of `feed`.

    Attributes:
        tokenizer: the model's.
        max_model_len: the longest sequence, in tokens.
    """

    def __init__(self, model: str, max_model_len: int, max_num_seqs: int = 8, max_step_tokens: int = 64) -> None:
        """Start the engine, dense, to feed `max_num_seqs` sequences side by side, `max_step_tokens` at most a step."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        self._llm = LLM(
            model,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_seqs * max_step_tokens, 64),
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=_cache_bytes(model, max_num_seqs * (max_model_len + 128)),
            attention_backend=BACKEND_NAME,
            additional_config={CONFIG_KEY: {"pruning_ratio": 0}},
            disable_log_stats=True,
            seed=0,
        )
        self.tokenizer: Any = self._llm.get_tokenizer()
        self.max_model_len = max_model_len
        self._max_step_tokens = max_step_tokens
        self._most_tokens = max(max_num_seqs * max_step_tokens, 64)
        self._core = self._llm.llm_engine.engine_core.engine_core
        self._runner = self._core.model_executor.driver_worker.worker.model_runner
        self._ids = itertools.count()
        self._consumer: Consumer | None = None
        self._indices: dict[str, int] = {}
        self._layouts = MixedLayouts(self._runner)
        self._layouts.use(FilterConfig(pruning_ratio=0))
        self._watch_hidden_states()

    def use(self, config: FilterConfig) -> None:
        """Filter by these settings from now on; what is counted starts anew.

        Raises:
            UnsupportedError: the model or the engine cannot be served with them.
        """
        if reasons := refusals.unsupported_reasons(self._llm.llm_engine.vllm_config, config):
            raise UnsupportedError(reasons)
        self._layouts.use(config)

    def status(self) -> Status:
        """Settings in force and totals since `use`."""
        return status_of(builders_of(self._runner), self._llm.llm_engine.vllm_config)

    def feed(self, sequences: Iterable[list[int]], step_tokens: int, consumer: Consumer) -> None:
        """Feed sequences in steps of `step_tokens` and hand on the last hidden states, step by step.

        Args:
            sequences: token ids, each 1 to max_model_len - 1 of them.
            step_tokens: tokens of each step, at most `max_step_tokens`; the last one has what is left.
            consumer: called in the order of the steps; positions of one sequence arrive in order.
        """
        from vllm import SamplingParams

        assert 0 < step_tokens <= self._max_step_tokens
        self._core.scheduler.scheduler_config.long_prefill_token_threshold = step_tokens
        engine = self._llm.llm_engine
        sampling = SamplingParams(temperature=0, max_tokens=1)
        self._consumer, self._indices = consumer, {}
        try:
            for index, tokens in enumerate(sequences):
                name = f"sequence{next(self._ids)}"
                self._indices[name] = index
                engine.add_request(name, {"prompt_token_ids": tokens}, sampling)
            while engine.has_unfinished_requests():
                # vLLM lifts the threshold for a sequence that is alone; the budget of the step then holds instead.
                budget = step_tokens * engine.get_num_unfinished_requests()
                self._core.scheduler.max_num_scheduled_tokens = min(budget, self._most_tokens)
                engine.step()
        finally:
            if engine.has_unfinished_requests():
                engine.abort_request(list(self._indices))
            self._consumer = None

    def builders(self) -> list[OfflineBuilder]:
        """The metadata builders of the worker, one for the layers of each layout."""
        return self._layouts.builders()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the next token, float32 [num_tokens, vocabulary], from hidden states [num_tokens, hidden_size]."""
        logits: torch.Tensor = self._runner.model.compute_logits(hidden)
        return logits.float()

    def close(self) -> None:
        """Shut the engine down."""
        self._core.shutdown()

    def _watch_hidden_states(self) -> None:
        runner = self._runner
        original = runner._get_prompt_logprobs_dict

        def watched(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
            if self._consumer is not None:
                starts = runner.query_start_loc.np
                for row, request_id in enumerate(runner.input_batch.req_ids):
                    # vLLM appends "-" and a suffix of its own to the name of a request.
                    index = self._indices[request_id.partition("-")[0]]
                    offset, count = int(starts[row]), num_scheduled_tokens[request_id]
                    first = int(runner.requests[request_id].num_computed_tokens)
                    self._consumer(index, first, hidden_states[offset : offset + count])
            return original(hidden_states, num_scheduled_tokens)

        runner._get_prompt_logprobs_dict = watched


def _cache_bytes(model: str, num_tokens: int) -> int:
    """Bytes of a dense KV cache of `num_tokens`, with room for rounding up to blocks."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(model).get_text_config()
    heads, size = kv_heads(text)
    return int(num_tokens * 1.1) * text.num_hidden_layers * heads * size * 2 * 4
