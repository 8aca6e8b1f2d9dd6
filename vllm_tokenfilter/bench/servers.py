"""Servers under test: started as a user starts vLLM, or running already; watched while they work."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from vllm_tokenfilter.errors import EvaluationError

_START_TIMEOUT_S = 900.0
#: Labels of vllm:cache_config_info, of one engine as in the log.
_CAPACITY = {"kv_cache_tokens": "kv_cache_size_tokens", "max_concurrency": "kv_cache_max_concurrency"}
#: vLLM's own server, started without its `vllm` command, which does not work with the CPU package.
SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")


@dataclass
class Server:
    """One server."""

    name: str  #: "stock", "r=0.5", or what the user called it.
    url: str  #: without /v1.
    process: subprocess.Popen[str] | None = None  #: ours to stop, or None.
    log: IO[str] | None = None  #: what it printed, or None.
    headers: dict[str, str] = field(default_factory=dict)  #: sent with every request.

    def model(self) -> tuple[str, int]:
        """The name and the longest sequence it serves.

        Raises:
            EvaluationError: it does not answer as an OpenAI-compatible vLLM server does.
        """
        try:
            answer = httpx.get(f"{self.url}/v1/models", headers=self.headers, timeout=10)
            answer.raise_for_status()
            first = answer.json()["data"][0]
            return str(first["id"]), int(first["max_model_len"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
            raise EvaluationError(
                f"url={self.url} does not answer /v1/models ({error}); start a vLLM server there or correct --url."
            ) from None

    def metrics(self) -> dict[str, float]:
        """Preemptions so far and what vLLM says of the KV cache, from /metrics; what is missing is left out."""
        try:
            text = httpx.get(f"{self.url}/metrics", headers=self.headers, timeout=30).text
        except httpx.HTTPError:
            return {}
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "vllm:num_preemptions_total":
                    found["preemptions"] = found.get("preemptions", 0) + sample.value
                elif sample.name == "vllm:cache_config_info":
                    # Blocks times their size is another figure where layers differ in what they store.
                    for key, label in _CAPACITY.items():
                        with contextlib.suppress(KeyError, ValueError):
                            found[key] = float(sample.labels[label])
        return found

    def printed(self) -> str:
        """The log so far."""
        if self.log is None:
            return ""
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def capacity(self) -> dict[str, float]:
        """What vLLM itself said at start: KV cache tokens and how many longest requests fit."""
        text = self.printed()
        found = {}
        if tokens := re.search(r"KV cache size: ([\d,]+) tokens", text):
            found["kv_cache_tokens"] = float(tokens[1].replace(",", ""))
        if requests := re.search(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", text):
            found["max_concurrency"] = float(requests[1])
        return found or {key: value for key, value in self.metrics().items() if key in _CAPACITY}


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(
    name: str, arguments: Sequence[str], environment: Mapping[str, str], command: Sequence[str] = SERVE
) -> Iterator[Server]:
    """A server of our own on 127.0.0.1, healthy, and stopped at the end.

    Results call it `name`. `arguments` follow the command, and the host and port that are chosen here; `environment` is
    added to this process's. What `command` starts answers /health once it is ready.

    Raises:
        EvaluationError: it does not become healthy; the end of its log is in the message.
    """
    port = free_port()
    # The log goes to a file, because a pipe that nobody reads would stop the server when full.
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **environment},
        )
        server = Server(name, f"http://127.0.0.1:{port}", process, log)
        try:
            _wait(server)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(server: Server) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    assert server.process is not None
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    lines = [line for line in server.printed().splitlines() if line.strip()]
    raise EvaluationError(f"The server {server.name} did not start; its log ends with: {' / '.join(lines[-4:])}")


class PeakMemory:
    """Peak resident size in bytes of a server's process tree while the block runs; 0 where it is not ours to see."""

    def __init__(self, server: Server, every_s: float = 0.2) -> None:
        self._pid = server.process.pid if server.process is not None else None
        self._every, self._stop = every_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0

    def __enter__(self) -> "PeakMemory":
        if self._pid is not None:
            self._look()
            self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stop.set()
        if self._pid is not None:
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self._look()

    def _look(self) -> None:
        total = 0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        self.peak = max(self.peak, total)
