"""Timed streaming completions through vLLM's own benchmark client.

Source: vllm/benchmarks/lib/endpoint_request_func.py (`async_request_openai_completions`), what `vllm bench serve` uses.
"""

import asyncio
from dataclasses import dataclass

import aiohttp
from vllm.benchmarks.lib.endpoint_request_func import (
    RequestFuncInput,
    RequestFuncOutput,
    async_request_openai_completions,
)

from vllm_tokenfilter.errors import EvaluationError

_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Timing:
    """One request; seconds."""

    first_token: float  #: from sending to the first token.
    between: list[float]  #: from each token to the next.
    output_tokens: int  #: tokens received.


def complete_together(
    url: str, model: str, prompts: list[list[int]], output_tokens: int, headers: dict[str, str]
) -> list[Timing]:
    """Send all prompts at once and wait for all answers, greedy and of exactly `output_tokens`.

    `url` is the server's, without /v1, `model` the name it serves; `headers` go along, such as an API key's.

    Raises:
        EvaluationError: a request failed.
    """
    answers = asyncio.run(_send(url, model, prompts, output_tokens, headers))
    for answer in answers:
        if not answer.success:
            reason = (answer.error.strip().splitlines() or ["no answer"])[-1]
            raise EvaluationError(f"url={url} failed a request ({reason}); see the server's log.")
    return [Timing(answer.ttft, list(answer.itl), answer.output_tokens) for answer in answers]


async def _send(
    url: str, model: str, prompts: list[list[int]], output_tokens: int, headers: dict[str, str]
) -> list[RequestFuncOutput]:
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        requests = [
            RequestFuncInput(
                prompt=prompt,
                api_url=f"{url}/v1/completions",
                prompt_len=len(prompt),
                output_len=output_tokens,
                model=model,
                ignore_eos=True,
                extra_body={"temperature": 0.0},
                extra_headers=headers,
            )
            for prompt in prompts
        ]
        return list(await asyncio.gather(*(async_request_openai_completions(item, session) for item in requests)))
