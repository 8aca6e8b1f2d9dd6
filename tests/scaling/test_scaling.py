"""One model over several workers, engines and servers, on CPU: the same text and choices as on one.

`--scaling-json FILE` writes what was measured, with where it came from.
"""

import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.serving.running import (
    TINY_FLAGS,
    complete,
    metrics_of,
    prompts_of,
    running,
    same_text,
    serve,
    settled,
    totals_of,
)
from vllm_tokenfilter.bench.servers import free_port
from vllm_tokenfilter.integration.status import Status, merge_workers
from vllm_tokenfilter.local.provenance import provenance
from vllm_tokenfilter.local.result_file import write_result

pytestmark = pytest.mark.slow

TOLERANCE = 1e-3
SEEN = "tokenfilter_tokens_seen_total"
RAY_PLATFORM = Path(__file__).parent / "ray_platform"
# vLLM binds one worker to the processors of one NUMA node; on a single one they are dealt out by hand.
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))}


@pytest.fixture(scope="module")
def measured(request):
    found = {}
    yield found
    if path := request.config.getoption("--scaling-json"):
        write_result(Path(path), {"provenance": provenance(), **found})


def generate(folder, model, prefix=(), env=None, **arguments):
    """What tests/scaling/scaled.py writes."""
    out = folder / "out.json"
    task = json.dumps({"llm": {"model": model, **arguments}, "out": str(out)})
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "tests.scaling.scaled", task],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_model):
    return generate(tmp_path_factory.mktemp("one"), tiny_model)


def compare(one, spread, num_workers):
    """Same choices on every worker and as on one, same text, log-probabilities within the tolerance."""
    assert len(spread["choices"]) == num_workers and spread["choices"][0]
    for choices in spread["choices"]:
        assert choices == one["choices"][0]
    assert spread["tokens"] == one["tokens"]
    pairs = zip(one["logprobs"], spread["logprobs"], strict=True)
    worst = max(abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))
    assert worst < TOLERANCE
    assert all(
        status["counters"]["tokens_seen"] == one["status"][0]["counters"]["tokens_seen"] for status in spread["status"]
    )
    return {
        "workers": num_workers,
        "requests": len(one["tokens"]),
        "seals_compared": len(one["choices"][0]),
        "choices_equal": True,
        "tokens_equal": True,
        "greatest_logprob_difference": worst,
        "tokens_pruned": spread["status"][0]["counters"]["tokens_pruned"],
        "rows_dense": spread["status"][0]["counters"]["rows_dense"],
        "seconds": spread["seconds"],
        "seconds_of_one": one["seconds"],
    }


def test_two_tensor_parallel_ranks_choose_and_write_like_one(tmp_path, tiny_model, one, measured):
    spread = generate(tmp_path, tiny_model, env=TWO_CORES, tensor_parallel_size=2)
    measured["tensor_parallel_2"] = compare(one, spread, 2)


def test_two_pipeline_stages_choose_and_write_like_one(tmp_path, tiny_model, measured):
    compiled = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    one = generate(tmp_path, tiny_model, **compiled)
    spread = generate(tmp_path, tiny_model, env=TWO_CORES, pipeline_parallel_size=2, **compiled)
    stages = spread["choices"]
    assert [layers for layers, _ in (choices[0] for choices in stages)] == [[0, 1], [2, 3]]
    # A seal's choices in the layers of both stages are one engine's.
    joined = [[first[0] + second[0], first[1] + second[1]] for first, second in zip(*stages, strict=True)]
    measured["pipeline_parallel_2"] = compare(one, {**spread, "choices": [joined]}, 1) | {"workers": 2}
    merged = merge_workers([Status.model_validate(status) for status in spread["status"]])
    alone = Status.model_validate(one["status"][0])
    assert merged.layers == alone.layers and [group.plan for group in merged.groups] == [merged.layers]
    counted, expected = ({**of.counters.as_dict(), "seals": 0, "seal_seconds": 0} for of in (merged, alone))
    assert counted == expected


def test_two_workers_that_ray_placed_choose_and_write_like_one(tmp_path, tiny_model, one, measured):
    ray = pytest.importorskip("ray", reason="pip install '.[scaling]'")
    # Ray listens on every interface, so it gets a network of its own that has none but the loopback.
    alone = ["unshare", "--net", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a network namespace is needed, so that Ray is not reachable from outside")
    out = tmp_path / "out.json"
    arguments = {"model": tiny_model, "tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    done = subprocess.run(
        [*alone, sys.executable, "-m", "tests.scaling.on_ray", json.dumps({"llm": arguments, "out": str(out)})],
        env={
            **os.environ,
            **TWO_CORES,
            "PYTHONPATH": os.pathsep.join([str(RAY_PLATFORM), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
            "VLLM_HOST_IP": "127.0.0.1",
            "RAY_USAGE_STATS_ENABLED": "0",
            # A cluster of this test's own, with a token of its own.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        },
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "RayWorkerProc" in done.stdout + done.stderr, "Ray placed no worker"
    measured["ray_2"] = {**compare(one, json.loads(out.read_text()), 2), "ray": ray.__version__}


PROMPTS = prompts_of(16, [30, 60, 90, 120])


def test_two_data_parallel_engines_behind_two_api_servers_are_one_server(tiny_model, measured):
    flags = ["--model", tiny_model, "--no-enable-prefix-caching", *TINY_FLAGS]
    with serve(*flags) as (url, _, _):
        expected, _ = complete(url, PROMPTS, 150)
        assert httpx.post(f"{url}/token_filtering", json={"pruning_ratio": 0.75}, timeout=60).status_code == 200
        expected_later, _ = complete(url, PROMPTS, 150)
    with serve(*flags, "--data-parallel-size", "2", "--api-server-count", "2", env=TWO_CORES) as (url, _, _):
        answers, _ = complete(url, PROMPTS, 150)
        assert all(same_text(answer, other) for answer, other in zip(answers, expected, strict=True))
        total = totals_of(answers)["seen"]
        settled(url, SEEN, total)
        # Either API server may answer a scrape; each has the sum of both engines, once.
        assert {metrics_of(url)[SEEN] for _ in range(12)} == {total}
        status = httpx.get(f"{url}/token_filtering", timeout=30).json()
        assert status["engines"] == 2 and status["counters"]["tokens_seen"] == total

        switched = httpx.post(f"{url}/token_filtering", json={"pruning_ratio": 0.75}, timeout=60)
        assert switched.status_code == 200 and switched.json()["engines"] == 2, switched.text
        later, _ = complete(url, PROMPTS, 150)
        assert all(same_text(answer, other) for answer, other in zip(later, expected_later, strict=True))
        ratio = 'tokenfilter_pruning_ratio{layers="0-3"}'
        assert settled(url, ratio, 0.75)[ratio] == 0.75
    measured["data_parallel_2"] = {
        "engines": 2,
        "api_servers": 2,
        "requests": len(answers) + len(later),
        "text_equal": True,
        "tokens_seen": total,
        "tokens_in_metrics": total,
        "ratio_changed_seconds": switched.json()["waited_seconds"],
    }


def test_a_router_spreads_requests_over_two_servers(tiny_model, measured):
    if importlib.util.find_spec("vllm_router") is None:
        pytest.skip("pip install '.[scaling]'")
    flags = ["--model", tiny_model, "--no-enable-prefix-caching", *TINY_FLAGS]
    with serve(*flags) as (first, _, _), serve(*flags) as (second, _, _):
        workers = ["--worker-urls", first, second, "--policy", "round_robin"]
        ports = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
        with running([sys.executable, "-m", "vllm_router.launch_router"], *workers, *ports) as (url, _, _):
            answers, _ = complete(url, PROMPTS, 60)
        total = totals_of(answers)["seen"]
        shares = []
        for server in (first, second):
            shares.append(httpx.get(f"{server}/token_filtering", timeout=30).json()["counters"]["tokens_seen"])
        assert sum(shares) == total and min(shares) > 0.3 * total
    measured["router"] = {"router": "vllm-router", "policy": "round_robin", "requests": len(answers), "tokens": shares}
