"""Greedy tokens from vLLM's GPU engine, and what was computed when and kept; argv is a JSON object.

`python tests/gpu_dryrun/generate.py '{"model": FOLDER, "rounds": [[[ids]]], "new_tokens": 8, "out": FILE, "llm": {},
"pretend": true}'`; with "pretend" there need be no GPU. "reads" (see tests/sharing.py) may be left out.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_USE_FLASHINFER_SAMPLER="0", HF_HUB_OFFLINE="1"
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).parent))


def watch(seals, steps, skips):
    """Note what each seal kept, by request and chunk, whose attention was skipped, by request and layer, and the tokens
    each step computed of each request."""
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
        for name, count in output.num_scheduled_tokens.items():
            steps.setdefault(name, []).append(count)
        return output

    def watched_prepare(self, input_batch, *args, **kwargs):
        rows[:] = input_batch.req_ids
        return prepare(self, input_batch, *args, **kwargs)

    def watched_build(self, *args, **kwargs):
        rows[:] = self.input_batch.req_ids
        return build(self, *args, **kwargs)

    def watched_adjust(self, step, capturing=False):
        adjusted = adjust(self, step, capturing)
        if self.anything_due:
            due_rows[:] = rows
        return adjusted

    def watched_seal(self, due, cache):
        kept = seal(self, due, cache)
        task = 0
        for row, first, last in zip(due.plan.rows, due.plan.first_chunk, due.plan.last_chunk, strict=True):
            for chunk in range(first, last):
                for layer, offsets in zip(cache.layer_indices.tolist(), kept[:, task + chunk - first], strict=True):
                    seals.append([due_rows[row], layer, int(chunk), offsets.tolist()])
            task += last - first + 1
        return kept

    def watched_decide(self, place, step):
        decide(self, place, step)
        layer, starts = int(self._carried.cache.layer_indices[place]), step.rows.query_start_loc.tolist()
        for name, start, end in zip(rows, starts, starts[1:], strict=False):
            if end > start and step.rows.slot_mapping[start] >= 0:
                skips.append([name, layer, self._buffers.skipped[start:end].tolist()])

    SkippingGroup.decide = watched_decide
    Scheduler.schedule, FilteredSteps.adjust, FilteredSteps.seal = watched_schedule, watched_adjust, watched_seal
    DefaultModelState.prepare_attn, GPUModelRunner._build_attention_metadata = watched_prepare, watched_build


def main(task):
    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "seed": 0}
    if task["pretend"]:
        import pretend_cuda

        pretend_cuda.install()
        # The compiled extension's normalisation is not there; vLLM's own Python is.
        settings["compilation_config"] = {"custom_ops": ["none"]}
        settings["kernel_config"] = {"ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}}
    from vllm import LLM, SamplingParams

    if "reads" in task:
        from vllm.model_executor.models import llama

        from tests.sharing import reading_attention

        llama.Attention = reading_attention({int(reader): owner for reader, owner in task["reads"].items()})
    seals, steps, skips = [], {}, []
    watch(seals, steps, skips)
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
    answers = []
    for prompts in task["rounds"]:
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers += llm.generate(prompts, sampling, use_tqdm=False)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    builders = [b for groups in worker.model_runner.attn_groups for group in groups for b in group.metadata_builders]
    result = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "names": [answer.request_id for answer in answers],
        "runner": type(worker.model_runner).__module__,
        "steps": steps,
        "seals": seals,
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
