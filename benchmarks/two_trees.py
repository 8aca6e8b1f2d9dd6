"""Two checkouts of this repository side by side, under the loads of `bench`: what a change costs a served model.

    python benchmarks/two_trees.py --before /path/to/other/checkout --json two_trees.json

Both servers run at once and idle while the other is measured; every other repeat runs backwards. Needs the machine for
itself. Exits with 1 if a median of this checkout is more than --allowed worse.
"""

import argparse
import contextlib
import json
import statistics
from pathlib import Path

from vllm_tokenfilter.bench.run import BenchmarkPlan, run
from vllm_tokenfilter.bench.servers import started
from vllm_tokenfilter.integration.server.arguments import server_arguments
from vllm_tokenfilter.local.models import default_model_path

HERE = Path(__file__).parents[1]
#: Figure of a sample -> whether more of it is better.
FIGURES = {"output_tokens_per_s": True, "first_token_s": False, "between_median_s": False}


def say(stage, units):
    print(stage, units or "", flush=True)
    return lambda unit=None: print(" ", unit, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="root of the other checkout")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4000])
    parser.add_argument("--concurrencies", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--allowed", type=float, default=0.02)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    flags = ["--model", str(default_model_path()), "--served-model-name", "model"]
    flags += ["--max-model-len", str(max(options.contexts) + options.output_tokens + 1)]
    flags += ["--max-num-seqs", str(max(options.concurrencies)), "--kv-cache-memory-bytes", str(1 << 30)]
    words = server_arguments(flags, options.ratio)
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(started(name, words, {"PYTHONPATH": str(tree.resolve())}))
            for name, tree in (("before", options.before), ("now", HERE))
        ]
        plan = BenchmarkPlan(
            "", options.contexts, options.concurrencies, [], options.repeats, options.output_tokens,
            urls={server.name: server.url for server in servers},
        )  # fmt: skip
        samples = run(plan, options.json, say).samples
        print(json.dumps({server.name: server.capacity() for server in servers}))
    worst = 0.0
    for context in options.contexts:
        for concurrency in options.concurrencies:
            own = {(s.server, s.repeat): s for s in samples if (s.context, s.concurrency) == (context, concurrency)}
            for figure, more_is_better in FIGURES.items():
                medians = {}
                for name in ("before", "now"):
                    values = [getattr(own[name, repeat], figure) for repeat in range(options.repeats)]
                    medians[name] = statistics.median(statistics.mean(v) if isinstance(v, list) else v for v in values)
                change = medians["now"] / medians["before"] - 1
                worst = max(worst, -change if more_is_better else change)
                print(f"{concurrency} x {context} tokens, {figure}: {medians['now']:.4g}, {change:+.1%}")
    return int(worst > options.allowed)


if __name__ == "__main__":
    raise SystemExit(main())
