"""Makes docs/inspect.png and docs/dashboard.png from real runs: `python docs/make_screenshots.py [NAME...]`.

Needs Chromium; for the dashboard Prometheus too. Grafana is not needed: each panel's queries are answered by Prometheus
and drawn by this script in the dashboard's own grid.
"""

import html
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
SECONDS, STEP = 90, 2
COLOURS = ("#0550ae", "#bc4c00", "#1a7f37", "#8250df", "#cf222e", "#57606a")


def screenshot(page: Path, picture: Path, width: int, height: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("install Chromium")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        flags += [f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri() + "#200"]
        subprocess.run([browser, *flags], check=True, capture_output=True, timeout=120)
    print(f"{picture.name}: {picture.stat().st_size / 1024:.0f} KiB")


def inspect(folder: Path) -> None:
    page = folder / "inspect.html"
    command = [sys.executable, "-m", "vllm_tokenfilter.cli.app", "inspect", "--text", str(ROOT / "docs" / "memory.md")]
    subprocess.run([*command, "--html", str(page), "--limit", "700"], check=True, cwd=ROOT)
    screenshot(page, ROOT / "docs" / "inspect.png", 1000, 1250)


def dashboard(folder: Path) -> None:
    with server(folder) as url, prometheus(folder, url.removeprefix("http://")) as source:
        started = time.time()
        load(url, started + SECONDS)
        page = folder / "dashboard.html"
        page.write_text(render(source, started, time.time()))
    screenshot(page, ROOT / "docs" / "dashboard.png", 1200, 1130)


@contextmanager
def process(command, log: Path, health: str, **arguments):
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
    with process(command, folder / "server.log", f"{url}/health"):
        yield url


@contextmanager
def prometheus(folder: Path, target: str):
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{STEP}s", "evaluation_interval": f"{STEP}s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "targets.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
    shutil.copy(ROOT / "deploy" / "prometheus" / "alerts.yml", folder)
    url = f"http://127.0.0.1:{free_port()}"
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    command += [f"--web.listen-address={url.removeprefix('http://')}"]
    with process(command, folder / "prometheus.log", f"{url}/-/ready", cwd=folder):
        yield url


def load(url: str, until: float) -> None:
    """Long and short prompts from eight users."""
    prose = (ROOT / "docs" / "memory.md").read_text() + (ROOT / "README.md").read_text()

    def user(number: int) -> None:
        turn = 0
        while time.time() < until:
            start = (number * 900 + turn * 350) % 4000
            length = 120 if (number + turn) % 4 == 0 else 5000
            prompt = {"model": "SmolLM2-135M-Instruct", "prompt": prose[start : start + length], "max_tokens": 96}
            httpx.post(f"{url}/v1/completions", json=prompt, timeout=300).raise_for_status()
            turn += 1

    users = [threading.Thread(target=user, args=(number,)) for number in range(8)]
    for one in users:
        one.start()
    for one in users:
        one.join()


def series(source: str, target: dict, started: float, ended: float):
    """(label, [(time, value)]) of one query, over the run."""
    query = target["expr"].replace("$__rate_interval", "20s").replace("$instance", ".*")
    asked = {"query": query, "start": started, "end": ended, "step": STEP}
    for found in httpx.get(f"{source}/api/v1/query_range", params=asked).raise_for_status().json()["data"]["result"]:
        label = target["legendFormat"]
        for name, value in found["metric"].items():
            label = label.replace("{{" + name + "}}", value)
        points = [(at - started, float(value)) for at, value in found["values"] if value != "NaN"]
        if points:
            yield label, points


def shown(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.1%}"
    return f"{value * 1000:.0f} ms" if unit == "s" and value < 1 else f"{value:.3g}" + (" s" if unit == "s" else "")


def render(source: str, started: float, ended: float) -> str:
    """The dashboard's panels in its grid, drawn from Prometheus's answers."""
    parts = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place, unit = panel["gridPos"], panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "none")
        area = f"grid-area: {place['y'] + 1} / {place['x'] + 1} / span {place['h']} / span {place['w']}"
        lines = [one for target in panel.get("targets", ()) for one in series(source, target, started, ended)]
        if panel["type"] == "row":
            body = ""
        elif not lines:
            body = "<p>no data</p>"
        elif panel["type"] == "stat":
            body = f"<p class=stat>{shown(lines[0][1][-1][1], unit)}</p>"
        else:
            body = curves(lines, unit, ended - started)
        kind = "row" if panel["type"] == "row" else "panel"
        parts.append(f'<section class={kind} style="{area}"><h2>{html.escape(panel["title"])}</h2>{body}</section>')
    style = (
        "body{font:13px system-ui,sans-serif;margin:8px;background:#f6f8fa;color:#1f2328}h2{font-size:13px;margin:0}"
        "main{display:grid;grid-template-columns:repeat(24,1fr);grid-auto-rows:27px;gap:4px}.panel{background:#fff;"
        "border:1px solid #d1d9e0;padding:4px 8px;overflow:hidden}"
        ".stat{font-size:26px;margin:4px 0}ul{margin:0;padding:0}"
        "li{display:inline;margin-right:10px}svg{width:100%;height:120px}"
    )
    return f"<!doctype html><meta charset=utf-8><style>{style}</style><main>{''.join(parts)}</main>"


def curves(lines, unit: str, seconds: float) -> str:
    most = max(value for _, points in lines for _, value in points) or 1.0
    drawn, names = [], []
    for number, (label, points) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{at / seconds * 300:.1f},{96 - value / most * 90:.1f}" for at, value in points)
        drawn.append(
            f'<polyline points="{path}" fill=none stroke="{colour}" vector-effect=non-scaling-stroke stroke-width=2 />'
        )
        names.append(f'<li style="color:{colour}">{html.escape(label)} {shown(points[-1][1], unit)}</li>')
    plot = f'<svg viewBox="0 0 300 100" preserveAspectRatio=none>{"".join(drawn)}</svg>'
    return f"<div>top {shown(most, unit)}</div>{plot}<ul>{''.join(names)}</ul>"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or ("inspect", "dashboard"):
            {"inspect": inspect, "dashboard": dashboard}[name](Path(scratch))
