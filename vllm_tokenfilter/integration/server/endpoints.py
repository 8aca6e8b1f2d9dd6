"""The server's side: metrics on vLLM's /metrics, and /token_filtering over HTTP.

Both are vLLM endpoint plugins, made in every API server process. vLLM loads an endpoint plugin only if VLLM_PLUGINS
names it. `token_filtering_metrics` adds no route, and is named by us wherever the backend is selected
(`workarounds.name_metrics_plugin`); `token_filtering_http` adds routes, and is named by whoever starts the server:
`vllm-tokenfilter serve` does.

Source: vllm/plugins/endpoint_plugins/interface.py, vllm/entrypoints/serve/middleware/authenticate.py.
"""

import asyncio
import json
import reprlib
import time
from argparse import Namespace
from collections.abc import Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_tokenfilter import __version__
from vllm_tokenfilter.config import SKIP_UNITS
from vllm_tokenfilter.integration import refusals, registration, versions, workarounds
from vllm_tokenfilter.integration.server.metrics import Exporter
from vllm_tokenfilter.integration.status import Status, merge_engines
from vllm_tokenfilter.layer_plan import ranges

logger = init_logger("vllm.tokenfilter")

#: Seconds from one look at the engines to the next.
METRICS_INTERVAL_S = 1.0
#: And from one look at whether the engines live to the next, while they are asked something.
ALIVE_INTERVAL_S = 1.0
PATH = "/token_filtering"


class MetricsEndpoint:
    """Exports the metrics of `metrics.py`."""

    name = workarounds.METRICS_PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Nothing to attach: vLLM serves its registry on /metrics."""

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Start to look at the engines, in one API server of several."""
        if not _is_ours(engine_client) or engine_client.vllm_config.parallel_config._api_process_rank > 0:
            return
        state.token_filtering_exporter = asyncio.create_task(_export(engine_client))


async def _export(engine_client: Any) -> None:
    exporter, failing = Exporter(), False
    while True:
        try:
            exporter.update(await _status(engine_client))
            failing = False
        except EngineDeadError:
            return
        except Exception:
            exporter.count_failure()
            if not failing:
                logger.exception(
                    "Token Filtering: the engines do not answer for their counters; metrics keep their last values "
                    "until they do."
                )
            failing = True
        await asyncio.sleep(METRICS_INTERVAL_S)


class HttpEndpoint:
    """GET and POST /token_filtering."""

    name = "token_filtering_http"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; those who may use /v1 may use them."""
        app.add_api_route(PATH, _get, methods=["GET"])
        app.add_api_route(PATH, _post, methods=["POST"])

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Nothing of our own: the routes ask the engines."""


async def _get(request: Request) -> JSONResponse:
    if refusal := _not_allowed(request):
        return refusal
    engine_client = request.app.state.engine_client
    return JSONResponse(report(await _status(engine_client), engine_client.vllm_config.model_config.model))


async def _post(request: Request) -> JSONResponse:
    if refusal := _not_allowed(request):
        return refusal
    ratio = _wanted_ratio(await request.body())
    if isinstance(ratio, str):
        return _error(400, ratio)
    engine_client = request.app.state.engine_client
    return await _from_engines(engine_client, _switch(engine_client, ratio))


async def _switch(engine_client: Any, ratio: float) -> JSONResponse:
    started = time.monotonic()
    client = engine_client.engine_core
    engines = _engines_of(client)
    answers: list[dict[str, Any]] = []
    reserved: list[Any] = []
    # In the order of the ranks, so that of two callers one gets all engines.
    for engine in engines:
        answer = await client._call_utility_async("token_filtering_prepare", ratio, engine=engine)
        if "refused" in answer or "busy" in answer:
            for other in reserved:
                await client._call_utility_async("token_filtering_cancel", engine=other)
            return _error(400, answer["refused"]) if "refused" in answer else _error(409, answer["busy"])
        if "unchanged" in answer:
            answers.append(answer["unchanged"])
        else:
            reserved.append(engine)
    answers += await asyncio.gather(*(_switch_engine(client, engine) for engine in reserved))
    if given_up := [answer["busy"] for answer in answers if "busy" in answer]:
        return _error(409, given_up[0])
    waited = round(time.monotonic() - started, 3)
    return JSONResponse({"pruning_ratio": ratio, **answers[-1], "engines": len(engines), "waited_seconds": waited})


async def _switch_engine(client: Any, engine: Any) -> dict[str, Any]:
    while True:
        answer = dict(await client._call_utility_async("token_filtering_switch", engine=engine))
        if answer.pop("done"):
            return answer


def report(status: Status, model: str) -> dict[str, Any]:
    """What GET answers: settings in force and per layer, counters, what is refused, versions; `model` is its name."""
    return {
        "backend": status.backend,
        "model": model,
        "settings": status.settings_in_force,
        "layers": [
            {
                "layer": row.index,
                "filtered": row.filtered,
                **({} if row.dense is None else {"reason": str(row.dense)}),
                "pruning_ratio": row.pruning_ratio if row.filtered else 0.0,
                "effective_ratio": row.layout.effective_ratio if row.layout is not None and row.filtered else 0.0,
                "skip_ratio": row.skip_units / SKIP_UNITS,
            }
            for row in status.layers.rows
        ],
        "layer_sets": [
            {
                "layers": ranges(group.plan.indices),
                "effective_ratio": group.plan.effective_ratio,
                **{key: value for key, value in group.counters.as_dict().items() if key.startswith("tokens_")},
                "blocks_held": group.blocks_held,
                "blocks_dense": group.blocks_dense,
            }
            for group in status.groups
            if group.plan.rows
        ],
        "counters": {
            **status.counters.as_dict(),
            **({} if status.cudagraph_mode is None else {"cudagraph_mode": status.cudagraph_mode}),
        },
        "engines": status.engines,
        "switching": status.switching,
        "prefix_caching": status.prefix_caching,
        "reachable": status.reachable and dict(zip(("lowest", "highest"), status.reachable, strict=True)),
        "refusals": [
            {"setting": refusal.setting, "reason": refusal.reason, "remedy": refusal.remedy}
            for refusal in refusals.REFUSALS
        ],
        "versions": {"vllm_tokenfilter": __version__, "vllm": versions.INSTALLED},
    }


def _wanted_ratio(body: bytes) -> float | str:
    """The ratio that a body asks for, or why it cannot be read."""
    remedy = 'send a JSON object such as {"pruning_ratio": 0.25}.'
    try:
        wanted = json.loads(body)
    except RecursionError:
        return f"the body must be JSON that is nested less deeply; {remedy}"
    except ValueError as error:
        return f"the body must be JSON ({error}); {remedy}"
    if not isinstance(wanted, dict):
        return f"the body must be a JSON object; {remedy}"
    if others := [key for key in wanted if key != "pruning_ratio"]:
        # Long and deep values are cut.
        return f"{', '.join(map(reprlib.repr, others[:3]))} cannot change at run time, only pruning_ratio can; {remedy}"
    ratio = wanted.get("pruning_ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        return f"pruning_ratio={reprlib.repr(ratio)} must be a number from 0 to below 1; {remedy}"
    return abs(float(ratio))


def _not_allowed(request: Request) -> JSONResponse | None:
    args = request.app.state.args
    tokens = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    # vLLM guards /v1 and a few other prefixes, and no others; the check itself is vLLM's.
    if tokens and not AuthenticationMiddleware(request.app, tokens).verify_token(request.headers):
        return JSONResponse({"error": "Unauthorized"}, status_code=401)
    if not _is_ours(request.app.state.engine_client):
        return _error(404, "this server was not started with --attention-backend TOKEN_FILTERING.")
    return None


def _error(status: int, message: str) -> JSONResponse:
    kind = {400: "BadRequestError", 404: "NotFoundError", 409: "ConflictError"}[status]
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def _is_ours(engine_client: Any) -> bool:
    vllm_config = engine_client.vllm_config
    return (
        registration.is_ours(vllm_config.attention_config.backend)
        and vllm_config.parallel_config.worker_extension_cls == workarounds.WORKER_EXTENSION
    )


def _engines_of(client: Any) -> list[Any]:
    return list(client.core_engines)


async def _from_engines(engine_client: Any, asking: Coroutine[Any, Any, Any]) -> Any:
    """What engines answer; a caller that hangs up does not stop it half-way.

    Raises:
        EngineDeadError: one died meanwhile. vLLM never answers for it, and a server with open requests does not end.
    """
    task = asyncio.create_task(asking)
    while not (await asyncio.wait({task}, timeout=ALIVE_INTERVAL_S))[0]:
        if engine_client.errored:
            task.cancel()
            raise engine_client.dead_error
    return task.result()


async def _status(engine_client: Any) -> Status:
    asking = engine_client.engine_core.call_utility_all_async("token_filtering_status")
    answers = await _from_engines(engine_client, asking)
    return merge_engines([Status.model_validate(answer) for answer in answers])
