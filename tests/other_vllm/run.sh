#!/usr/bin/env bash
# The tests that say whether the vLLM of an environment is served: its names and behaviours, engines, a server, the GPU
# path without a GPU. Usage, from the repository's root: tests/other_vllm/run.sh PYTHON [contract | TESTS...]
set -euo pipefail
python=$1 what=${2:-all}
shift $(($# < 2 ? $# : 2))
test() { "$python" -m pytest -q "$@"; }

"$python" -c 'import vllm, vllm_tokenfilter as ours; print(f"vLLM {vllm.__version__}: {vllm.__file__}, {ours.__file__}")'
case $what in
all | contract)
  # Names, signatures and behaviours; settings, flags and files as the server reads them; steps with stand-ins.
  test tests/contract tests/structure/test_versions.py tests/method/test_configs.py tests/integration
  [ "$what" = contract ] && exit
  # Against the independent reference: parity, preemption, prefix caching. Ratio 0 is stock vLLM. Plan, skipping.
  test tests/engine tests/tuning
  # A server over HTTP, with chat.
  test tests/serving/test_server.py
  # Both model runners, Triton interpreted.
  test -m slow tests/gpu_dryrun
  ;;
*) test "$what" "$@" ;;
esac
