"""Cuts prompts on a grid of the request's own positions, so that an answer does not depend on who else is served.

What a token sees depends on where its step began: the chunks sealed by then are filtered, later tokens are raw. vLLM
ends a step of a prompt wherever other requests leave no more room. Here it ends where `layout.next_stop` says, or the
request waits for the next step. `workarounds.py` chooses the grid, `long_prefill_token_threshold`, so that it fits into
a step beside all requests that may decode in it.

The rule stands where vLLM has one for hybrid models that cache Mamba states; those keep vLLM's.

Source: vllm/v1/core/sched/scheduler.py (`schedule`, `_mamba_block_aligned_split`, `_handle_stopped_request`),
async_scheduler.py.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_tokenfilter.integration import refusals
from vllm_tokenfilter.layout import next_stop


class GridScheduler(Scheduler):
    """vLLM's scheduler, but a request's steps end where its own positions say."""

    need_mamba_block_aligned_split: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hybrid, self.need_mamba_block_aligned_split = self.need_mamba_block_aligned_split, True
        # Another ratio while the server runs changes neither the chunk nor the window.
        self._layout = refusals.settings_of(self.vllm_config).layout

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Tokens of the request's next step, where `num_new_tokens` have room; 0: it waits."""
        # At a streamed prompt's turns vLLM takes back what it computed ahead; what that made due stays sealed.
        if request.resumable and request.num_output_placeholders:
            return 0
        grid = self.scheduler_config.long_prefill_token_threshold
        if self._hybrid:
            room = min(num_new_tokens, grid or num_new_tokens)
            return super()._mamba_block_aligned_split(request, room, num_new_local_computed_tokens)
        start = request.num_computed_tokens + num_new_local_computed_tokens
        end = next_stop(start, request.num_prompt_tokens, grid, self._layout)
        wanted = min(end, request.num_tokens_with_spec + request.num_output_placeholders) - start
        return wanted if wanted <= num_new_tokens else 0


class AsyncGridScheduler(GridScheduler, AsyncScheduler):
    """The same where vLLM schedules a step before the last one is done."""
