"""Deliberate breaks: each invariant of the method broken once, to show that a test of `make test` fails.

    python -m tests.breaks.run            all of tests/breaks/breaks.toml
    python -m tests.breaks.run NAME ...   only these

The tree is copied to a temporary folder; each break is applied there, the tests that hold its invariant are run, and
the file is put back. A break is caught if they fail, and missed if they pass. Before that the same tests pass unbroken.

Add a break with every invariant you add; name the quickest test that holds it. tests/breaks/test_breaks.py keeps
every break's text in step with the code.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BREAKS = Path(__file__).with_name("breaks.toml")
# What git does not track and tests do not need.
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__")
_TIMEOUT_S = 900


@dataclass(frozen=True)
class Break:
    """One deliberate mistake.

    Attributes:
        name: of the break.
        invariant: what it breaks, in a line.
        file: below the root.
        old: text that occurs in the file exactly once.
        new: what takes its place.
        tests: node ids, of which at least one must fail.
    """

    name: str
    invariant: str
    file: str
    old: str
    new: str
    tests: list[str]

    def apply(self, tree):
        """Break a copy of the tree; returns the text that was there."""
        path = tree / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its old text occurs {text.count(self.old)} times in {self.file}, not once")
        path.write_text(text.replace(self.old, self.new))
        return text


def load(path=BREAKS):
    """The breaks of a file."""
    return [Break(name, **entry) for name, entry in tomllib.loads(path.read_text()).items()]


def run_tests(tree, tests):
    """pytest's exit status over these tests of a tree, and the end of its output: 0 all passed, 1 some failed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    return done.returncode, "\n".join(done.stdout.splitlines()[-25:])


def check(breaks, tree):
    """Print what becomes of each break; the number of those that were not caught."""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(tree, Path(folder) / "tree", ignore=_LEFT_OUT))
        status, output = run_tests(copy, list(dict.fromkeys(test for one in breaks for test in one.tests)))
        if status != 0:
            print(f"The tests fail without any break:\n{output}")
            return len(breaks)
        for one in breaks:
            before, started = one.apply(copy), time.monotonic()
            status, output = run_tests(copy, one.tests)
            (copy / one.file).write_text(before)
            said = {0: "MISSED", 1: "caught"}.get(status, f"pytest ended with {status}:\n{output}\n")
            missed += status != 1
            print(f"{said:6} {one.name} ({time.monotonic() - started:.0f} s): {one.invariant}", flush=True)
    print(f"{len(breaks) - missed} of {len(breaks)} breaks caught.")
    return missed


def main():
    breaks, wanted = load(), sys.argv[1:]
    if unknown := set(wanted) - {one.name for one in breaks}:
        sys.exit(f"unknown breaks: {', '.join(sorted(unknown))}")
    sys.exit(bool(check([one for one in breaks if not wanted or one.name in wanted], ROOT)))


if __name__ == "__main__":
    main()
