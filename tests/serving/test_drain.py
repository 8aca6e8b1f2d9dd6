"""Another ratio while requests are preempted for want of blocks: those that were there finish first, and all finish."""

import asyncio
import re

import httpx
import pytest

from tests.serving.running import complete, prompts_of, serve
from tests.tiny import BLOCK_BYTES


def preemptions(url):
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return float(re.search(r"^vllm:num_preemptions_total\{.*?\} (\S+)$", text, re.MULTILINE)[1])


@pytest.mark.slow
def test_requests_that_lose_their_blocks_meanwhile_still_finish_first(tiny_model):
    flags = ["--model", tiny_model, "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    flags += ["--kv-cache-memory-bytes", str(30 * BLOCK_BYTES), "--no-enable-prefix-caching", "--max-num-seqs", "16"]
    with serve(*flags) as (url, _, _):
        ended = []

        async def meanwhile(client, one):
            while not preemptions_so_far(await client.get("/metrics")):
                await asyncio.sleep(0.05)
            switch = asyncio.create_task(client.post("/token_filtering", json={"pruning_ratio": 0.25}))
            await asyncio.sleep(0.1)
            later = [asyncio.create_task(one(prompt)) for prompt in prompts_of(4, [60], seed=5)]
            answer = await switch
            finished = (await client.get("/metrics")).text
            ended.append(
                sum(map(float, re.findall(r"^vllm:request_success_total\{.*?\} (\S+)$", finished, re.MULTILINE)))
            )
            ended.append(sum(task.done() for task in later))
            return answer, await asyncio.gather(*later)

        def preemptions_so_far(answer):
            found = re.search(r"^vllm:num_preemptions_total\{.*?\} (\S+)$", answer.text, re.MULTILINE)
            return found and float(found[1]) > 0

        answers, (switched, later) = complete(url, prompts_of(16, [60, 100]), 300, 16, meanwhile)
        assert switched.status_code == 200 and switched.json()["previous"] == 0.5, switched.text
        # All that were there, preempted ones included, had finished; none that came later had.
        assert ended == [16, 0]
        assert {answer["usage"]["completion_tokens"] for answer in [*answers, *later]} == {300}
        assert preemptions(url) > 0
        assert httpx.get(f"{url}/token_filtering").json()["layer_sets"][0]["blocks_held"] == 0
