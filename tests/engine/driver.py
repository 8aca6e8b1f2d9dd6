"""Drives a real engine step by step in this process and records what the filter saw and chose."""

import gc
import itertools
from dataclasses import dataclass, field

import numpy as np

from vllm_tokenfilter.layout import stored_tokens

#: The largest difference of a log-probability to the reference's, in float32.
TOLERANCE = 2e-3


@dataclass
class Run:
    """One uninterrupted life of a request: from its start, or from a preemption, to the next or its end.

    Attributes:
        record: the request.
        start: tokens taken over from the prefix cache.
        taken_over: per layer, (first position, end, Run) of the runs that computed them.
        steps: tokens of each step.
        choice: (layer, chunk) -> offsets that stayed.
        skipped: layer -> whether each token's attention was skipped.
        sampled: indices of the output tokens that were sampled in this run.
    """

    record: "Record"
    start: int = 0
    taken_over: dict = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    choice: dict = field(default_factory=dict)
    skipped: dict = field(default_factory=dict)
    sampled: list[int] = field(default_factory=list)

    @property
    def end(self):
        return self.start + sum(self.steps)


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

        from vllm_tokenfilter.integration.cpu import builder as step_builder
        from vllm_tokenfilter.integration.cpu import sealing
        from vllm_tokenfilter.kernels.cpu import skip

        self.records: dict[str, Record] = {}
        self._rows: list[Run] = []
        self._rows_of_due: dict[int, list[Run]] = {}
        self._writers: dict = {}
        self._num_builders = self._turn = 0
        self._layouts = None
        build, seal = step_builder.TokenFilteringMetadataBuilder.build, sealing.seal

        def watched_build(builder, common_prefix_len, common, fast_build=False):
            real = int(common.slot_mapping[0]) >= 0
            seq_lens, query_lens = common.seq_lens.numpy().copy(), np.diff(common.query_start_loc_cpu.numpy())
            tables = common.block_table_tensor.numpy().copy()
            if real:
                self._num_builders = len(self.builders())
                if self._turn == 0:
                    self._saw_step(seq_lens, query_lens)
                self._turn = (self._turn + 1) % self._num_builders
            metadata = build(builder, common_prefix_len, common, fast_build)
            if real:
                self._saw_blocks(builder, tables, seq_lens, query_lens)
                if builder.due is not None:
                    self._rows_of_due[id(builder.due)] = list(self._rows)
            return metadata

        def watched_seal(due, cache, layout, config, carried=None):
            sealed = seal(due, cache, layout, config, carried)
            if cache.paged.num_blocks > 1:
                self._saw_seal(due, sealed)
            return sealed

        monkeypatch.setattr(step_builder.TokenFilteringMetadataBuilder, "build", watched_build)
        monkeypatch.setattr(sealing, "seal", watched_seal)
        decide = skip.decide_skips

        def watched_decide(state, place, ratio_units):
            skipped = decide(state, place, ratio_units)
            self._saw_skips(state.rows, self._skipping_layer(state, place), skipped.copy())
            return skipped

        monkeypatch.setattr(skip, "decide_skips", watched_decide)
        arguments = {"dtype": "float32", "enforce_eager": True, "max_logprobs": 8, "seed": 0, **arguments}
        self.llm = LLM(
            model=model,
            attention_backend="TOKEN_FILTERING",
            additional_config={"token_filtering": token_filtering},
            **arguments,
        )
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner

    def use(self, config):
        """Filter by these settings from now on; of an engine that started dense."""
        from vllm_tokenfilter.integration.offline.mixed_layouts import MixedLayouts

        self._layouts = self._layouts or MixedLayouts(self.runner)
        self._layouts.use(config)

    def builders(self):
        """The metadata builders of all groups."""
        groups = itertools.chain.from_iterable(self.runner.attn_groups)
        return [builder for group in groups for builder in group.metadata_builders]

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
        self._rows = []
        for row, request_id in enumerate(self.runner.input_batch.req_ids):
            record = self.records[request_id if request_id in self.records else request_id.rpartition("-")[0]]
            computed = int(seq_lens[row] - query_lens[row])
            if not record.runs or record.runs[-1].end != computed:
                record.runs.append(Run(record, computed))
            run = record.runs[-1]
            run.steps.append(int(query_lens[row]))
            # The first time a length is reached, the token behind it is sampled; afterwards it is only recomputed.
            index = run.end - len(record.prompt)
            if index >= 0 and all(index not in other.sampled for other in record.runs):
                run.sampled.append(index)
            self._rows.append(run)

    def _saw_blocks(self, builder, tables, seq_lens, query_lens):
        """Note who wrote which block, and whose blocks a run took over; a block is named by its group and number."""
        filtered, size = builder.layout is not None, builder.block_size
        layout = builder.layout or builder.config.layout
        layers = builder.plan.indices
        # What is taken over comes in pieces of a chunk where layers are filtered, of a block where they are dense.
        piece, blocks_per_piece = (layout.chunk_size, layout.kept_per_chunk // size) if filtered else (size, 1)
        for row, run in enumerate(self._rows):
            if run.start and len(run.steps) == 1:
                # Before any other row of the step writes: a block that is taken over is written by nobody.
                pieces = [
                    (
                        index * piece,
                        (index + 1) * piece,
                        self._writers[layers[0], tables[row, index * blocks_per_piece]],
                    )
                    for index in range(run.start // piece)
                ]
                run.taken_over.update(dict.fromkeys(layers, pieces))
        for row, run in enumerate(self._rows):
            shared = run.start // layout.chunk_size
            computed = int(seq_lens[row] - query_lens[row])
            slots = stored_tokens(computed, layout, shared) + int(query_lens[row]) if filtered else int(seq_lens[row])
            has_mark = filtered and shared > 0
            first_own = run.start // piece * blocks_per_piece + has_mark
            for block in tables[row, first_own : -(-slots // size) + has_mark]:
                self._writers[layers[0], block] = run

    def _skipping_layer(self, state, place):
        """The layer whose scores these are."""
        for builder in self.builders():
            if builder.skipping and builder.skipping.carried is state.carried:
                return next(index for index, own in builder.skipping.places.items() if own == place)
        raise AssertionError("these scores belong to no layer")

    def _saw_skips(self, rows, layer, skipped):
        for row, run in enumerate(self._rows):
            run.skipped.setdefault(layer, []).extend(skipped[rows.starts[row] : rows.starts[row + 1]].tolist())

    def _saw_seal(self, due, sealed):
        position = 0
        rows = self._rows_of_due.pop(id(due))
        for row, first, last in zip(due.plan.rows, due.plan.first_chunk, due.plan.last_chunk, strict=True):
            for chunk in range(first, last):
                for layer, kept in zip(sealed.layer_indices, sealed.kept[:, position], strict=True):
                    rows[row].choice[layer, chunk] = kept.tolist()
                position += 1

    def close(self):
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.core.shutdown()
        del self.llm, self.engine, self.core, self.runner
        cleanup_dist_env_and_memory()
        gc.collect()


class Comparison:
    """The reference's view of recorded runs, each computed once."""

    def __init__(self, model, settings):
        self.model, self.settings = model, settings
        self.near_ties = self.choices = 0
        self._results = {}

    def result(self, run):
        """The reference's result of a run; runs it took blocks over from come first."""
        from tests import reference

        if id(run) not in self._results:
            record = run.record
            tokens = (record.prompt + record.output)[: run.end]
            steps, total = [], run.start
            for step in run.steps:  # an abort can leave a last step whose token nobody received
                if total + step > len(tokens):
                    break
                steps.append(step)
                total += step
            pieces = None
            if run.start:
                pieces = [
                    [(first, end, self.result(writer)) for first, end, writer in run.taken_over[layer]]
                    for layer in range(len(self.model.model.layers))
                ]
            result = reference.run(
                self.model,
                tokens[:total],
                steps,
                self.settings,
                run.choice,
                taken_over=pieces,
                backend_skips=run.skipped or None,
            )
            self.near_ties += result.near_ties
            self.choices += result.choices
            self._results[id(run)] = run, result
        return self._results[id(run)][1]

    def worst(self, record):
        """The largest difference in log-probability over all sampled tokens of a record."""
        worst = 0.0
        for run in record.runs:
            for index in run.sampled:
                if index >= len(record.logprobs):
                    continue
                position = len(record.prompt) + index - 1
                for token, value in record.logprobs[index].items():
                    worst = max(worst, abs(float(self.result(run).logprobs[position, token]) - value))
        return worst


def check(engine, model, names):
    """Hold every sampled token of these requests to the reference: log-probabilities, and choices (few near ties)."""
    comparison = Comparison(model, engine.settings)
    for name in names:
        record = engine.records[name]
        assert record.logprobs, f"{name} produced nothing"
        worst = comparison.worst(record)
        assert worst < TOLERANCE, f"{name}: log-probabilities differ by {worst}"
    ties, choices = comparison.near_ties, comparison.choices
    assert ties <= 0.01 * choices, f"{ties} near ties in {choices} choices are not rare"
    print(f"{len(names)} requests, {choices} choices, {ties} near ties")
