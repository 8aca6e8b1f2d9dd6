"""Alerts and dashboard: what Prometheus makes of them, and that every metric they name exists."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.test_manifests import DEPLOY, run, tool

DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
METRIC = re.compile(r"\b(?:tokenfilter_|vllm:)[a-z0-9_]+")


def panel_queries():
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def alert_queries():
    return [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]


NAMES = sorted({name for query in panel_queries() + alert_queries() for name in METRIC.findall(query)})


def test_prometheus_takes_the_configuration_and_the_alerts():
    run(tool("promtool"), "check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_alerts_fire_when_they_should_and_only_then():
    run(tool("promtool"), "test", "rules", DEPLOY / "prometheus" / "alerts_test.yml")


def test_every_alert_is_tried():
    told = (DEPLOY / "prometheus" / "alerts_test.yml").read_text()
    assert [r["alert"] for g in ALERTS["groups"] for r in g["rules"] if r["alert"] not in told] == []


def test_every_panels_query_is_promql(tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(panel_queries())
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    run(tool("promtool"), "check", "rules", "--lint=none", tmp_path / "rules.yml")
    rules[0]["expr"] = "sum(rate(x)"
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    broken = subprocess.run(
        [tool("promtool"), "check", "rules", tmp_path / "rules.yml"], capture_output=True, check=False
    )
    assert broken.returncode, "the check does not find a broken query"


def test_the_dashboard_is_one_grafana_reads():
    models = pytest.importorskip(
        "grafana_foundation_sdk.models.dashboard", reason="grafana-foundation-sdk is not installed"
    )
    read = models.Dashboard.from_json(DASHBOARD)
    assert read.uid == "vllm-tokenfilter" and len(read.panels) == len(DASHBOARD["panels"])


def test_panels_do_not_overlap_and_say_what_they_show():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or (panel["targets"] and panel["description"]), panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("tokenfilter_")])
def test_a_metric_of_ours_is_in_the_table(name):
    metrics = pytest.importorskip(
        "vllm_tokenfilter.integration.server.metrics", reason="the table of metrics is not there"
    )
    assert name in {metric.name for metric in metrics.METRICS}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("vllm:")])
def test_a_metric_of_vllm_exists(name):
    loggers = pytest.importorskip("vllm.v1.metrics.loggers", reason="vLLM is not installed")
    assert f'"{re.sub("_(total|bucket)$", "", name)}"' in Path(loggers.__file__).read_text()
