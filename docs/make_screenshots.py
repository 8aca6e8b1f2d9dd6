"""Makes docs/inspect.png and docs/dashboard.png from real runs: `python docs/make_screenshots.py [NAME...]`.

Needs Chromium; for the dashboard Prometheus too. Grafana is not needed, and docs/dashboard.png is not a picture of it:
Prometheus, with the configuration and the alerts of deploy/, watches a server under load, answers every query of
deploy/grafana/dashboard.json, and this script draws the answers in the dashboard's own grid. A query without an answer
and a rule that cannot be evaluated are errors.
"""

import html
import json
import math
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import yaml

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
SECONDS, SCRAPE = 120, 2
RATE = f"{10 * SCRAPE}s"
#: Both mechanisms, and layers of both kinds, so that every panel has something to show.
SETTINGS = {"pruning_ratio": 0.5, "first_layer": 15, "attention_skipping": {"ratio": 0.1, "schedule": {"kind": "tail"}}}
#: Has samples only where a layer cannot do what it is set to, which none of the pictured model is.
MAY_BE_EMPTY = "tokenfilter_layers_unskipped"
COLOURS = ("#0550ae", "#bc4c00", "#1a7f37", "#8250df", "#cf222e", "#57606a")
WIDTH, CELL, GAP = 1200, 22, 6
STYLE = f"""
body {{ font: 13px/1.35 system-ui, sans-serif; margin: 12px; background: #f6f8fa; color: #1f2328; }}
h1 {{ font-size: 17px; margin: 0; }} h2 {{ font-size: 13px; margin: 0; }} p {{ margin: 2px 0 10px; }}
main {{ display: grid; grid-template-columns: repeat(24, 1fr); grid-auto-rows: {CELL}px; gap: {GAP}px; }}
.panel {{ background: #fff; border: 1px solid #d1d9e0; border-radius: 3px; padding: 5px 8px; overflow: hidden; }}
.row {{ align-self: center; }} .stat {{ font-size: 30px; line-height: 1; margin: 14px 0 0; text-align: center; }}
svg {{ display: block; margin: 3px 0; font-size: 11px; fill: #57606a; }}
ul {{ margin: 0; padding: 0; font-size: 12px; }} li {{ display: inline-block; margin-right: 12px; }}
i {{ display: inline-block; width: 12px; height: 3px; margin-right: 5px; vertical-align: middle; }}
"""


def screenshot(page: Path, picture: Path, height: int, width: int = 1000, fragment: str = "") -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("install Chromium")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        flags += [f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri() + fragment]
        subprocess.run([browser, *flags], check=True, capture_output=True, timeout=120)
    print(f"{picture.name}: {picture.stat().st_size / 1024:.0f} KiB")


def inspect(folder: Path) -> None:
    page = folder / "inspect.html"
    command = [sys.executable, "-m", "vllm_tokenfilter.cli.app", "inspect", "--text", str(ROOT / "docs" / "memory.md")]
    subprocess.run([*command, "--html", str(page), "--limit", "700"], check=True, cwd=ROOT)
    screenshot(page, ROOT / "docs" / "inspect.png", 1540, fragment="#200")


def dashboard(folder: Path) -> None:
    with server(folder) as url, prometheus(folder, url.removeprefix("http://"), SCRAPE) as source:
        started = time.time()
        load(url, started + SECONDS)
        rules = evaluated_rules(source)
        panels = [(panel, panel_series(source, panel, started, started + SECONDS)) for panel in panels_of_dashboard()]
    page = folder / "dashboard.html"
    page.write_text(render(panels, rules))
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel, _ in panels)
    screenshot(page, ROOT / "docs" / "dashboard.png", rows * (CELL + GAP) + 80, WIDTH)


@contextmanager
def process(command, log: Path, health: str, **arguments):
    """A program that runs, from when it is healthy on."""
    with log.open("w") as output:
        running = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **arguments)
    try:
        for _ in range(240):
            try:
                if httpx.get(health).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if running.poll() is not None:
                sys.exit(log.read_text()[-2000:])
            time.sleep(1)
        yield
    finally:
        running.terminate()
        running.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(folder: Path):
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "vllm_tokenfilter.cli.app", "serve", "--port", url.rpartition(":")[2]]
    command += ["--kv-cache-memory-bytes", "300000000", "--max-num-seqs", "6"]
    command += ["--additional-config", json.dumps({"token_filtering": SETTINGS})]
    with process(command, folder / "server.log", f"{url}/health"):
        yield url


@contextmanager
def prometheus(folder: Path, target: str, scrape_seconds: int):
    """Prometheus with the files of deploy/, but for the target and the interval; needs `prometheus` on the PATH."""
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {name: f"{scrape_seconds}s" for name in ("scrape_interval", "evaluation_interval")}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "targets.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
    shutil.copy(ROOT / "deploy" / "prometheus" / "alerts.yml", folder)
    url = f"http://127.0.0.1:{free_port()}"
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    command += [f"--web.listen-address={url.removeprefix('http://')}"]
    with process(command, folder / "prometheus.log", f"{url}/-/ready", cwd=folder):
        yield url


def asked(source: str, path: str, **arguments):
    """What Prometheus answers on one of its HTTP API's paths."""
    return httpx.get(f"{source}/api/v1/{path}", params=arguments).raise_for_status().json()["data"]


def evaluated_rules(source: str) -> list[dict]:
    """All alerts, each evaluated."""
    while True:
        rules = [rule for group in asked(source, "rules")["groups"] for rule in group["rules"]]
        if all(rule["health"] != "unknown" for rule in rules):
            break
        time.sleep(1)
    if failed := [f"{rule['name']}: {rule.get('lastError')}" for rule in rules if rule["health"] != "ok"]:
        sys.exit("\n".join(failed))
    return rules


def panels_of_dashboard() -> list[dict]:
    return json.loads(DASHBOARD.read_text())["panels"]


def load(url: str, until: float) -> None:
    """Eight users with long and short prompts, the long ones behind one start."""
    prose = (ROOT / "docs" / "memory.md").read_text() + (ROOT / "README.md").read_text()

    def user(number: int) -> None:
        turn = 0
        while time.time() < until:
            start = 1500 + (number * 900 + turn * 350) % 4000
            short = (number + turn) % 4 == 0
            text = prose[start : start + 120] if short else prose[:1500] + prose[start : start + 3000]
            prompt = {"model": "SmolLM2-135M-Instruct", "prompt": text, "max_tokens": 96}
            httpx.post(f"{url}/v1/completions", json=prompt, timeout=300).raise_for_status()
            turn += 1

    users = [threading.Thread(target=user, args=(number,)) for number in range(8)]
    for one in users:
        one.start()
    for one in users:
        one.join()


def panel_series(source: str, panel: dict, started: float, ended: float) -> list:
    """(label, [(seconds, value)]) of all queries of a panel."""
    found = []
    for target in panel.get("targets", ()):
        one = list(query_series(source, target, started, ended))
        if not one and MAY_BE_EMPTY not in target["expr"]:
            sys.exit(f"{panel['title']}: no data for {target['expr']}")
        found += one
    return found


def query_series(source: str, target: dict, started: float, ended: float):
    query = target["expr"].replace("$__rate_interval", RATE).replace("$instance", ".*")
    for found in asked(source, "query_range", query=query, start=started, end=ended, step=SCRAPE)["result"]:
        label = target["legendFormat"]
        for name, value in found["metric"].items():
            label = label.replace("{{" + name + "}}", value)
        points = [(at - started, float(value)) for at, value in found["values"] if math.isfinite(float(value))]
        if points:
            yield label, points


def shown(value: float, unit: str) -> str:
    if value == 0:
        return "0"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s" and value < 1:
        return f"{1000 * value:.3g} ms"
    number = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return number + {"s": " s", "ops": " /s"}.get(unit, "")


def render(panels, rules) -> str:
    """The dashboard's panels in its grid."""
    parts = []
    for panel, lines in panels:
        place, unit = panel["gridPos"], panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "none")
        area = f"grid-area: {place['y'] + 1} / {place['x'] + 1} / span {place['h']} / span {place['w']}"
        kind = "row" if panel["type"] == "row" else "panel"
        if kind == "row":
            body = ""
        elif not lines:
            body = "<p class=stat>no data</p>"
        elif panel["type"] == "stat":
            body = f"<p class=stat>{shown(lines[0][1][-1][1], unit)}</p>"
        else:
            body = curves(lines, unit, place["w"] * (WIDTH - 24 + GAP) // 24 - GAP - 18)
        parts.append(f'<section class={kind} style="{area}"><h2>{html.escape(panel["title"])}</h2>{body}</section>')
    firing = ", ".join(rule["name"] for rule in rules if rule["state"] == "firing") or "none"
    told = (
        f"{datetime.now(UTC):%Y-%m-%d}: {SECONDS} s of eight users at one CPU server; {len(rules)} alerts evaluated, "
        f"firing: {firing}. Drawn by docs/make_screenshots.py from Prometheus's answers; no picture of Grafana."
    )
    head = f"<!doctype html><meta charset=utf-8><style>{STYLE}</style><h1>vLLM with Token Filtering</h1><p>{told}</p>"
    return f"{head}<main>{''.join(parts)}</main>"


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to at least `most`, at most six."""
    size = 10 ** math.floor(math.log10(most / 4)) if most > 0 else 0.25
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor * 4 >= most * 0.999)
    return [step * number for number in range(math.ceil(most * 0.999 / step) + 1)] if most > 0 else [0, 1]


def curves(lines, unit: str, width: int, height: int = 142) -> str:
    left, bottom = 52, 16
    marks = ticks(max(value for _, points in lines for _, value in points))
    tall, wide = height - bottom - 8, width - left - 8

    def place(at: float, value: float) -> tuple[float, float]:
        return left + at / SECONDS * wide, 8 + tall - value / marks[-1] * tall

    drawn, names = [], []
    for mark in marks:
        _, y = place(0, mark)
        drawn.append(f'<line x1={left} x2={left + wide} y1="{y:.1f}" y2="{y:.1f}" stroke="#d1d9e0" />')
        drawn.append(f'<text x={left - 6} y="{y + 4:.1f}" text-anchor=end>{shown(mark, unit)}</text>')
    for second in range(0, SECONDS + 1, 30):
        x, _ = place(second, 0)
        anchor = "end" if second == SECONDS else "middle"
        drawn.append(f'<text x="{x:.1f}" y={height - 2} text-anchor={anchor}>{second} s</text>')
    for number, (label, points) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path, before = "", -math.inf
        for at, value in points:
            x, y = place(at, value)
            path += f"{'M' if at - before > 1.5 * SCRAPE else 'L'}{x:.1f} {y:.1f}"
            before = at
        drawn.append(f'<path d="{path}" fill=none stroke="{colour}" stroke-width=1.6 />')
        last = shown(points[-1][1], unit)
        names.append(f'<li><i style="background:{colour}"></i>{html.escape(label)}: {last}</li>')
    return f"<svg width={width} height={height}>{''.join(drawn)}</svg><ul>{''.join(names)}</ul>"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or ("inspect", "dashboard"):
            {"inspect": inspect, "dashboard": dashboard}[name](Path(scratch))
