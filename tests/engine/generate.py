"""Run engines, one after the other, and write each one's greedy tokens and log-probabilities as JSON.

argv is a JSON list of objects: `llm` (arguments of LLM), `out`, `log` (a file for what is printed meanwhile), `prompts`
(how many) and `status`.
"""

import json
import os
import random
import sys


def run(task):
    from vllm import LLM, SamplingParams

    llm = LLM(
        dtype="bfloat16", max_model_len=2048, kv_cache_memory_bytes=1 << 28, max_num_seqs=32, seed=0, **task["llm"]
    )
    draw = random.Random(1)
    prompts = [
        {"prompt_token_ids": [draw.randrange(100, 40000) for _ in range(draw.randrange(5, 400))]}
        for _ in range(task["prompts"])
    ]
    sampling = SamplingParams(temperature=0, max_tokens=64, logprobs=2, ignore_eos=True)
    # An engine in a process of its own starts with whatever has arrived, so that how prompts are cut into steps, which
    # a filter sees, would depend on the machine's load: nothing is scheduled before all of them are there.
    llm.sleep(level=0)
    llm.enqueue(prompts, sampling, use_tqdm=False)
    llm.wake_up(tags=["scheduling"])
    answers = [answer.outputs[0] for answer in llm.wait_for_completion(use_tqdm=False)]
    result = {
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [[sorted(e.logprob for e in step.values()) for step in answer.logprobs] for answer in answers],
        "status": llm.collective_rpc("token_filtering_status") if task["status"] else None,
    }
    with open(task["out"], "w") as file:
        json.dump(result, file)
    llm.llm_engine.engine_core.shutdown()


def main(tasks):
    for task in tasks:
        # The engine's process takes over what this one prints to.
        sys.stdout.flush()
        with open(task["log"], "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        run(task)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
