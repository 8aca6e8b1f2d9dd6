"""Run one engine, however it is spread, and write what it generated and what each worker chose as JSON.

argv is a JSON object: `llm` (arguments of LLM), `out`, `repeat`.
"""

import json
import random
import sys
import time

from vllm_tokenfilter.integration.worker import WorkerStatus


class RecordingWorker(WorkerStatus):
    """A worker that also keeps what it sealed."""

    def record_choices(self):
        from vllm_tokenfilter.integration.cpu import sealing

        seal, self.recorded = sealing.seal, []

        def watched(due, cache, layout, config, carried=None):
            sealed = seal(due, cache, layout, config, carried)
            self.recorded.append([sealed.layer_indices, sealed.kept.tolist()])
            return sealed

        sealing.seal = watched

    def choices(self):
        return list(self.recorded)


def prompts(lengths):
    draw = random.Random(1)
    return [{"prompt_token_ids": [draw.randrange(100, 40000) for _ in range(length)]} for length in lengths]


def main(task):
    from vllm import LLM, SamplingParams

    arguments = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 100_000_000,
        "attention_backend": "TOKEN_FILTERING",
        "worker_extension_cls": "tests.scaling.scaled.RecordingWorker",
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "seed": 0,
    }
    llm = LLM(**{**arguments, **task["llm"]})
    llm.collective_rpc("record_choices")
    sampling = SamplingParams(temperature=0, max_tokens=100, logprobs=2, ignore_eos=True)
    started = time.perf_counter()
    # How prompts are cut into steps is part of the input, and requests reach an engine one by one: long prompts are
    # sent alone, and those sent together are shorter than what is ever sealed of a prompt.
    answers = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts([700, 300, 1100, 140])]
    choices = llm.collective_rpc("choices")
    answers += llm.generate(prompts([120, 30, 90, 60, 110, 75, 45, 100]), sampling, use_tqdm=False)
    answers = [answer.outputs[0] for answer in answers]
    seconds = time.perf_counter() - started
    result = {
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)]
            for answer in answers
        ],
        "choices": choices,
        "status": llm.collective_rpc("token_filtering_status"),
        "seconds": seconds,
    }
    with open(task["out"], "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
