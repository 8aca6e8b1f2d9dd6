"""Greedy tokens from vLLM's GPU engine, and what was computed when and kept; argv is a JSON object.

`python tests/gpu_dryrun/generate.py '{"model": FOLDER, "rounds": [[[ids]]], "new_tokens": 8, "out": FILE, "llm": {},
"pretend": true}'`; with "pretend" there need be no GPU. "reads" (see tests/sharing.py) may be left out. "graphs" names
vLLM's mode of CUDA graphs; eager without.

A round is what happens while the engine steps until nobody is left: a prompt's token ids, or an event. Events are
{"prompt": [ids]}, {"abort": N} (the N-th request of all) and {"switch": RATIO}; "at" is the step of the round before
which they happen, 0 if it is not given.
"""

import dataclasses
import itertools
import json
import os
import queue
import sys
import time
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_USE_FLASHINFER_SAMPLER="0", HF_HUB_OFFLINE="1"
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).parent))


def watch(seals, steps, skips, decoding, at_replay):
    """Note what each seal kept, by request and chunk, whose attention was skipped, by request and layer, and the tokens
    each step computed of each request. `at_replay` does something after what was launched, in a CUDA graph too."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_tokenfilter.integration.gpu.skipping import SkippingGroup
    from vllm_tokenfilter.integration.gpu.steps import FilteredSteps

    rows, due_rows = [], []  # the requests of the running step's rows, and of the step that made seals due
    seal, adjust, schedule = FilteredSteps.seal, FilteredSteps.adjust, Scheduler.schedule
    decide = SkippingGroup.decide
    prepare, build = DefaultModelState.prepare_attn, GPUModelRunner._build_attention_metadata

    def watched_schedule(self, *args, **kwargs):
        output = schedule(self, *args, **kwargs)
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for name, count in output.num_scheduled_tokens.items():
            steps.setdefault(name, []).append([computed[name], count])
        if set(output.num_scheduled_tokens.values()) == {1}:
            decoding.add(len(computed))
        return output

    def life(name):
        """How often a request was preempted so far, and began anew."""
        own = steps.get(name, ())  # nobody's, of vLLM's warm-up requests
        return sum(start != before + count for (before, count), (start, _) in itertools.pairwise(own))

    def watched_prepare(self, input_batch, *args, **kwargs):
        rows[:] = input_batch.req_ids
        return prepare(self, input_batch, *args, **kwargs)

    def watched_build(self, *args, **kwargs):
        rows[:] = self.input_batch.req_ids
        return build(self, *args, **kwargs)

    def watched_adjust(self, step, capturing=False):
        adjusted = adjust(self, step, capturing)
        if self.anything_due:
            due_rows[:] = [[name, life(name)] for name in rows]
        return adjusted

    def watched_seal(self, due, cache):
        kept = seal(self, due, cache)
        task = 0
        for row, first, last in zip(due.plan.rows, due.plan.first_chunk, due.plan.last_chunk, strict=True):
            for chunk in range(first, last):
                for layer, offsets in zip(cache.layer_indices.tolist(), kept[:, task + chunk - first], strict=True):
                    seals.append([*due_rows[row], layer, int(chunk), offsets.tolist()])
            task += last - first + 1
        return kept

    def watched_decide(self, place, step):
        decide(self, place, step)

        def note():
            layer, starts = int(self._carried.cache.layer_indices[place]), step.rows.query_start_loc.tolist()
            for name, start, end in zip(rows, starts, starts[1:], strict=False):
                if end > start and step.rows.slot_mapping[start] >= 0:
                    skips.append([name, life(name), layer, self._buffers.skipped[start:end].tolist()])

        at_replay(note)

    SkippingGroup.decide = watched_decide
    Scheduler.schedule, FilteredSteps.adjust, FilteredSteps.seal = watched_schedule, watched_adjust, watched_seal
    DefaultModelState.prepare_attn, GPUModelRunner._build_attention_metadata = watched_prepare, watched_build


def plant(kept):
    """A fault: lengths that attention reads are in a new tensor in each step; `kept`: nor are old ones freed."""
    from vllm_tokenfilter.integration.gpu.steps import FilteredSteps

    adjust, lengths = FilteredSteps.adjust, []

    def planted(self, step, capturing=False):
        adjusted = adjust(self, step, capturing)
        lengths[: 0 if kept else None] = [adjusted.seq_lens.clone()]
        return dataclasses.replace(adjusted, seq_lens=lengths[0])

    FilteredSteps.adjust = planted


def step_in_this_process():
    """Let vLLM's engine in this process be the one that serves, without its sockets and its loop: its pauses, and what
    it calls back when it is idle, are there."""
    from vllm.v1.engine import core, core_client

    class EngineCore(core.EngineCoreProc):
        def __init__(self, *args, **kwargs):
            core.EngineCore.__init__(self, *args, **kwargs)
            self.input_queue = queue.Queue()
            self.engines_running, self.shutdown_state = False, core.EngineShutdownState.RUNNING

    core_client.EngineCore = EngineCore


class Requests:
    """Sends events to an engine, and steps it.

    Attributes:
        answers: outputs of the requests that finished, by number.
        switched: what changes of the ratio answered.
    """

    def __init__(self, llm, sampling):
        self._llm, self._sampling = llm, sampling
        self._core = llm.llm_engine.engine_core.engine_core
        self._switch = None
        self.answers, self.switched = {}, []

    def play(self, events):
        """One round."""
        events = [event if isinstance(event, dict) else {"prompt": event} for event in events]
        events.sort(key=lambda event: event.get("at", 0))
        engine, step = self._llm.llm_engine, 0
        while events or engine.has_unfinished_requests() or self._switch:
            while events and events[0].get("at", 0) <= step:
                self._happen(events.pop(0))
            for output in engine.step():
                if output.finished:
                    self.answers[int(output.request_id)] = output
            if not self._core.has_work():
                self._core._notify_idle_state_callbacks()
            if self._switch and self._switch.done():
                self._changed(self._switch.result())
            step += 1

    def _happen(self, event):
        if "prompt" in event:
            prompts = [{"prompt_token_ids": event["prompt"]}]
            self._llm.enqueue(prompts, self._sampling, use_tqdm=False)
        elif "abort" in event:
            self._llm.llm_engine.abort_request([str(event["abort"])])
        else:
            assert self._core.token_filtering_prepare(event["switch"]) == {}
            self._changed(self._core.token_filtering_switch())

    def _changed(self, answer):
        """What a caller over HTTP does with an answer; see `integration/server/endpoints.py`."""
        self._switch = None
        if not isinstance(answer, dict):
            self._switch = answer
        elif answer["done"]:
            self.switched.append(answer)
        else:
            self._changed(self._core.token_filtering_switch())


def main(task):
    settings = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 64 << 20, "seed": 0}
    if graphs := task.get("graphs"):
        # Without PyTorch's compiler, which is not what is tried here.
        settings["compilation_config"] = {"mode": 0, "cudagraph_mode": graphs}
        if "PIECEWISE" in graphs:
            os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"
            settings["compilation_config"]["cudagraph_capture_sizes"] = [1, 2, 4, 8, 16, 128]  # prompts fit too
    else:
        settings["enforce_eager"] = True
    counts, at_replay = {}, lambda action: action()
    if task["pretend"]:
        import pretend_cuda
        import pretend_graphs

        pretend_cuda.install()
        counts, at_replay = pretend_graphs.counts, pretend_graphs.at_replay
        # The compiled extension's normalisation is not there; vLLM's own Python is.
        settings.setdefault("compilation_config", {})["custom_ops"] = ["none"]
        settings["kernel_config"] = {"ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}}
    from vllm import LLM, SamplingParams

    if "reads" in task:
        from vllm.model_executor.models import llama

        from tests.sharing import reading_attention

        llama.Attention = reading_attention({int(reader): owner for reader, owner in task["reads"].items()})
    step_in_this_process()
    seals, steps, skips, decoding = [], {}, [], set()
    watch(seals, steps, skips, decoding, at_replay)
    if "plant" in task:
        plant(**task["plant"])
    llm = LLM(model=task["model"], **{**settings, **task["llm"]})
    filtering = "additional_config" in task["llm"]
    sampling = SamplingParams(
        temperature=0,
        max_tokens=task["new_tokens"],
        ignore_eos=True,
        detokenize=False,
        logprobs=task.get("logprobs"),
    )
    started = time.perf_counter()
    requests = Requests(llm, sampling)
    for events in task["rounds"]:
        requests.play(events)
    answers = [answer for _, answer in sorted(requests.answers.items())]
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    builders = [b for groups in worker.model_runner.attn_groups for group in groups for b in group.metadata_builders]
    result = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "names": [answer.request_id for answer in answers],
        "runner": type(worker.model_runner).__module__,
        "steps": steps,
        "seals": seals,
        "switched": requests.switched,
        "graphs": counts,
        "decoding": sorted(decoding),
        "skips": skips,
        "status": llm.collective_rpc("token_filtering_status")[0] if filtering else None,
        "logprobs": [
            [sorted(entry.logprob for entry in step.values()) for step in answer.outputs[0].logprobs or []]
            for answer in answers
        ],
        "builders": sorted({type(builder).__name__ for builder in builders}),
        "seconds": round(time.perf_counter() - started, 1),
    }
    Path(task["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
