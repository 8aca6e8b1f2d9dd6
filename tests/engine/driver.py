"""Drives a real engine step by step in this process and records what the filter saw and chose."""

import gc
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Run:
    """One uninterrupted life of a request: from its start, or from a preemption, to the next or its end."""

    steps: list[int] = field(default_factory=list)
    choice: dict = field(default_factory=dict)
    sampled: list[int] = field(default_factory=list)

    @property
    def end(self):
        return sum(self.steps)


@dataclass
class Record:
    """A request and what became of it; `logprobs[i]` maps token ids to log-probabilities of output i."""

    prompt: list[int]
    runs: list[Run] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finished: bool = False


class Engine:
    """A vLLM engine in this process whose metadata builder and sealing are watched."""

    def __init__(self, monkeypatch, model, token_filtering, **arguments):
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        from vllm_tokenfilter.integration import backend, sealing

        self.records: dict[str, Record] = {}
        self._last_rows: list[str] = []
        self._pending: list[tuple[str, Run]] = []
        build, seal = backend.TokenFilteringMetadataBuilder.build, sealing.seal

        def watched_build(builder, common_prefix_len, common, fast_build=False):
            real = int(common.slot_mapping[0]) >= 0
            metadata = build(builder, common_prefix_len, common, fast_build)
            if real:
                self._saw_step(common.seq_lens.numpy(), np.diff(common.query_start_loc_cpu.numpy()))
            return metadata

        def watched_seal(due, cache, config):
            sealed = seal(due, cache, config)
            if cache.paged.num_blocks > 1:
                self._saw_seal(due, sealed)
            return sealed

        monkeypatch.setattr(backend.TokenFilteringMetadataBuilder, "build", watched_build)
        monkeypatch.setattr(sealing, "seal", watched_seal)
        self.llm = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            attention_backend="TOKEN_FILTERING",
            additional_config={"token_filtering": token_filtering},
            max_logprobs=8,
            seed=0,
            **arguments,
        )
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner

    def prefill_steps_of(self, tokens):
        """Cut prompts into steps of at most this many tokens."""
        self.core.scheduler.scheduler_config.long_prefill_token_threshold = tokens

    def add(self, name, prompt, max_tokens):
        from vllm import SamplingParams

        self.records[name] = Record(list(prompt))
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=5)
        self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)

    def abort(self, name):
        self.engine.abort_request([name])
        self.records[name].finished = True

    def step(self):
        for output in self.engine.step():
            record = self.records[output.request_id]
            record.output = list(output.outputs[0].token_ids)
            record.logprobs = [
                {token: entry.logprob for token, entry in position.items()} for position in output.outputs[0].logprobs
            ]
            record.finished = record.finished or output.finished

    def drain(self):
        while self.engine.has_unfinished_requests():
            self.step()
        return self.records

    def status(self):
        return self.llm.collective_rpc("token_filtering_status")[0]

    def _saw_step(self, seq_lens, query_lens):
        self._last_rows = []
        for row, request_id in enumerate(self.runner.input_batch.req_ids):
            name = next(key for key in self.records if request_id == key or request_id.startswith(f"{key}-"))
            record, computed = self.records[name], int(seq_lens[row] - query_lens[row])
            if not record.runs or record.runs[-1].end != computed:
                assert computed == 0, "a request continued from a length nobody computed"
                record.runs.append(Run())
            run = record.runs[-1]
            run.steps.append(int(query_lens[row]))
            # The first time a length is reached, the token behind it is sampled; afterwards it is only recomputed.
            index = run.end - len(record.prompt)
            if index >= 0 and all(index not in other.sampled for other in record.runs):
                run.sampled.append(index)
            self._last_rows.append((name, run))

    def _saw_seal(self, due, sealed):
        position = 0
        for row, first, last in zip(due.rows, due.first_chunk, due.last_chunk, strict=True):
            _, run = self._last_rows[row]
            for chunk in range(first, last):
                for layer, kept in zip(sealed.layer_indices, sealed.kept[:, position], strict=True):
                    run.choice[layer, chunk] = kept.tolist()
                position += 1

    def close(self):
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.core.shutdown()
        del self.llm, self.engine, self.core, self.runner
        cleanup_dist_env_and_memory()
        gc.collect()


def compare(model, record, settings):
    """Check every sampled token of a record against the reference; returns (largest difference, near ties, choices)."""
    from tests import reference

    worst, ties, choices = 0.0, 0, 0
    for run in record.runs:
        sampled = [index for index in run.sampled if index < len(record.logprobs)]
        if not sampled:
            continue
        tokens = (record.prompt + record.output)[: run.end]
        steps, total = [], 0
        for step in run.steps:  # an abort can leave a last step whose token nobody received
            if total + step > len(tokens):
                break
            steps.append(step)
            total += step
        last = reference.run(model, tokens[:total], steps, settings, run.choice)
        for index in sampled:
            position = len(record.prompt) + index - 1
            for token, value in record.logprobs[index].items():
                worst = max(worst, abs(float(last.logprobs[position, token]) - value))
        ties, choices = ties + last.near_ties, choices + last.choices
    return worst, ties, choices
