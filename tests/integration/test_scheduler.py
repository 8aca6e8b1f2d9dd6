"""vLLM's schedulers with our cuts, over a model that answers anything: what every token sees, in any crowd."""

import random
from collections import deque

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_tokenfilter.integration.kv_cache_spec import FilteredAttentionSpec
from vllm_tokenfilter.integration.layers import longest_step
from vllm_tokenfilter.integration.scheduler import AsyncGridScheduler, GridScheduler

LONGEST = 2048


class Crowd:
    """A scheduler, and the steps that it makes of requests that come and go."""

    def __init__(self, model_path, kind, budget, settings, num_blocks=60):
        from vllm.engine.arg_utils import EngineArgs

        config = EngineArgs(
            model=model_path,
            max_model_len=LONGEST,
            max_num_seqs=12,
            max_num_batched_tokens=budget,
            enable_prefix_caching=False,
            scheduling_policy="priority",
            attention_backend="TOKEN_FILTERING",
            additional_config={"token_filtering": settings},
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = num_blocks
        self.grid = config.scheduler_config.long_prefill_token_threshold
        self.longest_step = longest_step(config)
        shape = {"block_size": 32, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
        self.scheduler = kind(
            config,
            KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], self.spec(config, shape))]),
            StructuredOutputManager(config),
            block_size=32,
        )
        self.steps, self.preemptions, self.longest_wait = [], 0, 0
        self.answer = 5
        self._flying, self._depth = deque(), 2 if kind is AsyncGridScheduler else 1

    def spec(self, config, shape):
        from vllm_tokenfilter.integration import refusals

        self.layout = refusals.settings_of(config).layout
        return FilteredAttentionSpec(**shape, layout=self.layout, max_step_tokens=self.longest_step)

    def add(self, name, length, output, priority):
        sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        self.scheduler.add_request(Request(name, [7] * length, sampling, None, priority=priority))

    def add_turn(self, name, length):
        """A part of a prompt that is streamed; the turn ends with the token 9."""
        sampling = SamplingParams(max_tokens=1000, stop_token_ids=[9])
        self.scheduler.add_request(Request(name, [7] * length, sampling, None, resumable=True))

    def abort(self, name):
        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    def step(self):
        """Schedule one step, and hand back the answers of the oldest one under way."""
        prompts = [request for request in self.scheduler.running if request.is_prefill_chunk]
        before = {name: request.num_computed_tokens for name, request in self.scheduler.requests.items()}
        out = self.scheduler.schedule()
        for new in out.scheduled_new_reqs:
            before[new.req_id] = new.num_computed_tokens
        for name, start in zip(
            out.scheduled_cached_reqs.req_ids, out.scheduled_cached_reqs.num_computed_tokens, strict=True
        ):
            before[name] = start
        for name, count in out.num_scheduled_tokens.items():
            self.steps.append((self.scheduler.requests[name].num_prompt_tokens, before[name], before[name] + count))
        preempted = out.preempted_req_ids or set()
        self.preemptions += len(preempted)
        if prompts and not preempted:
            waited = prompts[0].request_id not in out.num_scheduled_tokens
            self.longest_wait = self.longest_wait + 1 if waited else 0
            assert not self.longest_wait, "the first prompt under way waits although nobody was preempted"
        names = list(out.num_scheduled_tokens)
        tokens = [[] if self.scheduler.requests[name].is_prefill_chunk else [self.answer] for name in names]
        self._flying.append((out, ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, tokens)))
        if len(self._flying) >= self._depth or not names:
            self.scheduler.update_from_output(*self._flying.popleft())

    def run(self, seed, count=60):
        draw, joined, alive = random.Random(seed), 0, []
        while joined < count or self.scheduler.has_unfinished_requests():
            if joined < count and draw.random() < 0.3:
                name, joined = f"request{joined}", joined + 1
                alive.append(name)
                length = draw.choice((draw.randrange(1, 400), draw.randrange(100, 1500)))
                self.add(name, length, draw.randrange(1, 400), draw.randrange(3))
            if alive and draw.random() < 0.01:
                self.abort(alive.pop(draw.randrange(len(alive))))
            self.step()


#: Budget of a step -> settings, and the grid that fits beside eleven requests that decode.
CASES = {
    256: ({"pruning_ratio": 0.5}, 192),
    523: ({"pruning_ratio": 0.25, "recent_window": 300}, 512),
    2048: ({"pruning_ratio": 0.75, "chunk_size": 128, "recent_window": 128}, 512),
}


@pytest.mark.parametrize("kind", [GridScheduler, AsyncGridScheduler])
@pytest.mark.parametrize("budget", CASES)
def test_what_a_token_sees_follows_from_its_position_and_the_prompts_length(model_path, kind, budget):
    settings, grid = CASES[budget]
    crowd = Crowd(model_path, kind, budget, settings)
    crowd.run(seed=budget)
    layout = crowd.layout

    def sealed(length):
        return max(0, (length - layout.recent_window) // layout.chunk_size)

    assert crowd.preemptions and crowd.grid == grid
    again = 0
    for num_prompt, start, end in crowd.steps:
        assert 0 < end - start <= crowd.longest_step
        again += start >= num_prompt and end - start > 1
        for position in range(start, end):
            began = position // grid * grid if position < num_prompt else position
            assert sealed(start) == sealed(began), f"a prompt of {num_prompt}: a step of {start} to {end}"
    assert again, "no output was computed again"


@pytest.mark.parametrize("kind", [GridScheduler, AsyncGridScheduler])
@pytest.mark.parametrize("budget", [16, 63])
def test_a_budget_below_a_chunk_gets_everyone_served(model_path, kind, budget):
    crowd = Crowd(model_path, kind, budget, {"pruning_ratio": 0.5, "recent_window": 128})
    for index in range(5):
        crowd.add(f"request{index}", 200 + index, 150, index % 2)
    for _ in range(3000):
        if not crowd.scheduler.has_unfinished_requests():
            break
        crowd.step()
    assert not crowd.scheduler.has_unfinished_requests(), "somebody waits for ever"


@pytest.mark.parametrize("kind", [GridScheduler, AsyncGridScheduler])
def test_nothing_that_was_computed_is_taken_back_between_the_turns_of_a_streamed_prompt(model_path, kind):
    """A token that was computed ahead may have made a chunk due, which stays sealed."""
    crowd = Crowd(model_path, kind, 256, {"pruning_ratio": 0.5})
    for length, output in ((100, 29), (30, 1), (250, 90)):
        crowd.add_turn("session", length)
        for step in range(300):
            crowd.answer = 5 if step < output else 9
            crowd.step()
            if crowd.scheduler.requests["session"].status == RequestStatus.WAITING_FOR_STREAMING_REQ:
                break
        else:
            raise AssertionError("the turn does not end")
    assert [start for _, start, _ in crowd.steps] == [0, *(end for *_, end in crowd.steps[:-1])]
    assert crowd.steps[-1][2] > 100 + 30 + 250 + 50, "hardly anything was generated"
