"""The server's side: metrics on vLLM's /metrics, and /token_filtering over HTTP.

Both are vLLM endpoint plugins, made in every API server process. vLLM loads an endpoint plugin only if VLLM_PLUGINS
names it. `token_filtering_metrics` adds no route, and is named by us wherever the backend is selected
(`workarounds.name_metrics_plugin`); `token_filtering_http` adds routes, and is named by whoever starts the server:
`vllm-tokenfilter serve` does.

Source: vllm/plugins/endpoint_plugins/interface.py, vllm/entrypoints/serve/middleware/authenticate.py.
"""

import asyncio
import json
import time
from argparse import Namespace
from typing import Any

import vllm
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_tokenfilter import __version__
from vllm_tokenfilter.config import SKIP_UNITS, FilterConfig
from vllm_tokenfilter.integration import refusals, registration, workarounds
from vllm_tokenfilter.integration.layers import num_layers
from vllm_tokenfilter.integration.server.metrics import Exporter
from vllm_tokenfilter.integration.status import merge_engines

logger = init_logger("vllm.tokenfilter")

#: Seconds from one look at the engines to the next.
METRICS_INTERVAL_S = 1.0
PATH = "/token_filtering"


class MetricsEndpoint:
    """Exports the metrics of `vllm_tokenfilter/metrics.py`."""

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
    exporter = Exporter()
    while True:
        try:
            exporter.update(merge_engines(await _statuses(engine_client)))
        except EngineDeadError:
            return
        except Exception:
            logger.exception("Token Filtering: metrics are not exported any more.")
            return
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
    return JSONResponse(report(merge_engines(await _statuses(engine_client)), engine_client.vllm_config))


async def _post(request: Request) -> JSONResponse:
    if refusal := _not_allowed(request):
        return refusal
    ratio = _wanted_ratio(await request.body())
    if isinstance(ratio, str):
        return _error(400, ratio)
    # A client that hangs up does not stop a switch half-way.
    return await asyncio.shield(asyncio.ensure_future(_switch(request.app.state.engine_client, ratio)))


async def _switch(engine_client: Any, ratio: float) -> JSONResponse:
    started = time.monotonic()
    client = engine_client.engine_core
    engines = _engines_of(client)
    # In the order of the ranks, so that of two callers one gets all engines.
    for index, engine in enumerate(engines):
        answer = await client._call_utility_async("token_filtering_prepare", ratio, engine=engine)
        if answer:
            for other in engines[:index]:
                await client._call_utility_async("token_filtering_cancel", engine=other)
            return _error(400, answer["refused"]) if "refused" in answer else _error(409, answer["busy"])
    answers = await asyncio.gather(*(_switch_engine(client, engine) for engine in engines))
    waited = time.monotonic() - started
    return JSONResponse({**answers[0], "engines": len(engines), "waited_seconds": round(waited, 3)})


async def _switch_engine(client: Any, engine: Any) -> dict[str, Any]:
    while True:
        answer = dict(await client._call_utility_async("token_filtering_switch", engine=engine))
        if answer.pop("done"):
            return answer


def report(status: dict[str, Any], vllm_config: Any) -> dict[str, Any]:
    """What GET answers: settings in force and per layer, counters, what is refused, versions.

    Args:
        status: see `merge_engines`.
        vllm_config: the configuration in force.
    """
    settings = {name: status[name] for name in FilterConfig.model_fields}
    config, count = FilterConfig.parse(settings), num_layers(vllm_config)
    ratios, layouts = config.schedule.layer_ratios(config.pruning_ratio, count), config.layouts(count)
    skipped = config.skip_units(count)
    filtered, skipping = set(status["layers_filtered"]), set(status["layers_skipping"])
    reasons = {index: reason for reason, indices in status["layers_dense"].items() for index in indices}
    layers = [
        {
            "layer": index,
            "filtered": index in filtered,
            **({"reason": reasons[index]} if index in reasons else {}),
            "pruning_ratio": ratios[index] if index in filtered else 0.0,
            "effective_ratio": layout.effective_ratio if index in filtered and layout is not None else 0.0,
            "skip_ratio": skipped[index] / SKIP_UNITS if index in skipping else 0.0,
        }
        for index, layout in enumerate(layouts)
    ]
    rest = {"backend", "effective_ratio", "layers_filtered", "layers_dense", "groups", "engines", *settings}
    rest |= {"switching", "prefix_caching", "layer_table", "layers_skipping", "layers_unskipped", "group_ratio"}
    return {
        "backend": status["backend"],
        "model": vllm_config.model_config.model,
        "settings": settings,
        "layers": layers,
        "layer_sets": status["groups"],
        "counters": {key: value for key, value in status.items() if key not in rest},
        "engines": status["engines"],
        "switching": status["switching"],
        "prefix_caching": status["prefix_caching"],
        "refusals": [
            {"setting": refusal.setting, "reason": refusal.reason, "remedy": refusal.remedy}
            for refusal in refusals.REFUSALS
        ],
        "versions": {"vllm_tokenfilter": __version__, "vllm": vllm.__version__},
    }


def _wanted_ratio(body: bytes) -> float | str:
    """The ratio that a body asks for, or why it cannot be read."""
    remedy = 'send a JSON object such as {"pruning_ratio": 0.25}.'
    try:
        wanted = json.loads(body)
    except ValueError as error:
        return f"the body must be JSON ({error}); {remedy}"
    if not isinstance(wanted, dict):
        return f"the body must be a JSON object; {remedy}"
    if others := [key for key in wanted if key != "pruning_ratio"]:
        return f"{', '.join(map(str, others))} cannot change at run time, only pruning_ratio can; {remedy}"
    ratio = wanted.get("pruning_ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        return f"pruning_ratio={ratio!r} must be a number from 0 to below 1; {remedy}"
    return float(ratio)


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


async def _statuses(engine_client: Any) -> list[dict[str, Any]]:
    return list(await engine_client.engine_core.call_utility_all_async("token_filtering_status"))
