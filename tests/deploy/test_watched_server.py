"""A real Prometheus, with the files of deploy/, watches a served engine under load."""

import importlib.util
import json
import shutil
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.serving.running import TINY_FLAGS, complete, prompts_of, serve, settled, totals_of
from vllm_tokenfilter.integration.server.metrics import METRICS

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
SCRIPT = Path(__file__).parents[2] / "docs" / "make_screenshots.py"
SEEN = "tokenfilter_tokens_seen_total"
#: Layer 1 has a window, so it neither prunes nor skips, and says why.
MIXED = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 256}
SETTINGS = {"pruning_ratio": 0.5, "attention_skipping": {"ratio": 0.25}}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_screenshots", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_panel_has_data_every_rule_is_evaluated_and_no_counter_falls(script, model_path, tmp_path):
    model = tiny.save(tmp_path / "model", model_path, **MIXED)
    flags = ["--model", model, "--enable-prompt-tokens-details", *TINY_FLAGS]
    flags += ["--additional-config", json.dumps({"token_filtering": SETTINGS})]
    with serve(*flags) as (url, _, _), script.prometheus(tmp_path, url.removeprefix("http://"), 1) as source:
        prompts = prompts_of(200, [40, 90, 140, 300, 500])
        answers, started = [], time.time()
        # The same start again, so that the prefix cache has hits.
        for part in (prompts[:100], prompts[:50] + prompts[100:]):
            answers += complete(url, part, 24)[0]
        total = totals_of(answers)["seen"]
        assert settled(url, SEEN, total)[SEEN] == total

        def value(query):
            (found,) = script.asked(source, "query", query=query)["result"]
            return float(found["value"][1])

        time.sleep(2.5)
        assert value(SEEN) == total
        for name in (metric.name for metric in METRICS if metric.kind == "counter"):
            assert value(f"sum(resets({name}[10m]))") == 0, name
        assert value(f"min(count_over_time({SEEN}[10m]))") > 5

        for panel in script.panels_of_dashboard():
            for target in panel.get("targets", ()):
                drawn = list(script.query_series(source, target, started, time.time()))
                assert drawn, (panel["title"], target["expr"])
        rules = script.evaluated_rules(source)
        assert {rule["state"] for rule in rules} <= {"inactive", "pending"}
        # What this model cannot do is told, though for less long than the alerts wait.
        assert {rule["name"] for rule in rules if rule["state"] == "pending"} >= {"LayersCannotSkip"}
