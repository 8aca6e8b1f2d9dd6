"""A Ray Serve application: each replica runs the server of `vllm-tokenfilter serve` and passes requests on to it.

Ray's own LLM library (ray[llm]) brings a vLLM of its own, which is not the version this plugin is made for, so the
server runs beside it as a process. `serve run deploy.ray.serve_app:app flags="--config configs/smollm2-135m.yaml"`, or
serve.yaml.
"""

import asyncio
import shlex
import socket
import sys
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict
from ray import serve

_START_SECONDS = 1800
# What belongs to one connection and not to the message.
_OWN_HEADERS = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}

ingress = FastAPI(openapi_url=None)


class Arguments(BaseModel):
    """Of the application.

    Attributes:
        flags: what follows `vllm-tokenfilter serve`, quoted as in a shell; host and port are the replica's own.
    """

    model_config = ConfigDict(extra="forbid")
    flags: str = ""


@serve.deployment
@serve.ingress(ingress)
class Server:
    """One server and the way to it."""

    async def __init__(self, flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = [*shlex.split(flags), "--host", "127.0.0.1", "--port", str(port)]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vllm_tokenfilter.cli.app", "serve", *words
        )
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None)
        await self._wait_until_healthy()

    async def _wait_until_healthy(self) -> None:
        for _ in range(_START_SECONDS):
            try:
                if (await self._client.get("/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self._process.returncode is not None:
                break
            await asyncio.sleep(1)
        raise RuntimeError("the server did not start; its log says why")

    async def check_health(self) -> None:
        """Called by Ray; a replica that fails is replaced."""
        (await self._client.get("/health")).raise_for_status()

    @ingress.api_route("/{path:path}", methods=["GET", "POST"])
    async def forward(self, path: str, request: Request) -> Response:
        """Any request, streamed both ways."""
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _OWN_HEADERS}
        outgoing = self._client.build_request(
            request.method, "/" + path, params=request.query_params, headers=headers, content=await request.body()
        )
        answer = await self._client.send(outgoing, stream=True)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            finally:
                await answer.aclose()

        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _OWN_HEADERS}
        return StreamingResponse(body(), answer.status_code, kept)

    async def __del__(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()


def app(arguments: Arguments) -> serve.Application:
    """The application, as Ray Serve builds it from its configuration file."""
    return Server.bind(arguments.flags)
