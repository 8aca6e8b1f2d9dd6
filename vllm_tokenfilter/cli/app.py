"""The command `vllm-tokenfilter`, with serve, verify and plan."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_tokenfilter import __version__
from vllm_tokenfilter.cli import measure
from vllm_tokenfilter.cli.output import print_tables, progress_bar
from vllm_tokenfilter.errors import TokenFilterError
from vllm_tokenfilter.reports.tables import capacity_table

app = typer.Typer(
    name="vllm-tokenfilter",
    help="Token Filtering for vLLM: prune redundant tokens from the paged KV cache while requests decode.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def serve(
    context: typer.Context,
    config: Annotated[list[str] | None, typer.Option(help="A vLLM --config file, such as those in configs/.")] = None,
    pruning_ratio: Annotated[
        float | None, typer.Option(help="Share of each sealed chunk to remove from the cache; wins over the file.")
    ] = None,
) -> None:
    """Run vLLM's OpenAI-compatible server with Token Filtering on; any vLLM server flag can follow.

    Without a model it serves SmolLM2-135M-Instruct, which it makes ready on the first start, on 127.0.0.1 and in eager
    mode, which starts quickly; pass --no-enforce-eager to compile it. Unless told otherwise, it then removes half of
    the sealed tokens, as a mean over all layers, and none from the retrieval layers that `tune` found.
    """
    from vllm_tokenfilter.cli.serve import run

    run(context.args, config or [], pruning_ratio)


def verify(
    model: Annotated[str | None, typer.Option(help="Path or Hugging Face id; default: the embedded model.")] = None,
    pruning_ratio: Annotated[
        float | None, typer.Option(help="Pruning ratio to try; wins over the file's. 0.5 if neither is given.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Try the settings of this vLLM --config file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check the installation: versions, dense and filtered text side by side, and what was filtered."""
    from vllm_tokenfilter.cli.verify import print_report
    from vllm_tokenfilter.integration.offline import verification
    from vllm_tokenfilter.local.settings_file import read_settings

    settings = read_settings(config, pruning_ratio)
    with progress_bar() as progress:
        report = verification.verify(model, settings, progress)
    passed = all(report["checks"].values())
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
        print("PASS" if passed else "FAIL")
    raise typer.Exit(0 if passed else 1)


def plan(
    model_config: Annotated[str, typer.Option(help="A config.json, a folder that holds one, or a Hugging Face id.")],
    context: Annotated[int, typer.Option(help="The longest request, in tokens: vLLM's max_model_len.")],
    gpu_memory: Annotated[float | None, typer.Option(help="Memory of one GPU, in GiB.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Pruning ratio; repeatable.")] = None,
    config: Annotated[
        list[Path] | None, typer.Option(help="Also plan the settings of this vLLM --config file; repeatable.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs that share the model.")] = 1,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU's memory that vLLM takes.")] = 0.92,
    overhead: Annotated[float, typer.Option(help="GiB per GPU for activations, CUDA graphs and libraries.")] = 2.0,
    weights: Annotated[float | None, typer.Option(help="GiB of all weights; default: from the model.")] = None,
    kv_cache: Annotated[
        float | None, typer.Option(help="GiB of KV cache per GPU, if you know it; nothing is deducted.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Weights and KV cache: auto, bfloat16, float16 or float32.")] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens per block: 16 on GPUs, 32 on CPU.")] = 16,
    prefill_step: Annotated[int, typer.Option(help="Most prompt tokens in one step.")] = 512,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens sealed together.")] = None,
    recent_window: Annotated[int | None, typer.Option(help="Newest tokens, which are never removed.")] = None,
    first_layer: Annotated[int, typer.Option(help="First filtered layer.")] = 0,
    dense_layer: Annotated[list[int] | None, typer.Option(help="A layer that keeps every token; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict how many requests fit and what a token costs, dense and filtered, as vLLM counts at start."""
    from vllm_tokenfilter.config import FilterConfig
    from vllm_tokenfilter.local.settings_file import read_named_settings
    from vllm_tokenfilter.planning.deployment import Deployment, predict

    deployment = Deployment(
        model=model_config,
        gpu_memory=gpu_memory,
        utilization=gpu_memory_utilization,
        weights=weights,
        overhead=overhead,
        cache=kv_cache,
        context=context,
        block_size=block_size,
        prefill_step=prefill_step,
        tensor_parallel=tensor_parallel_size,
        dtype=dtype,
    )
    sizes = {key: value for key, value in (("chunk_size", chunk_size), ("recent_window", recent_window)) if value}
    shared = {**sizes, "first_layer": first_layer, "dense_layers": dense_layer or []}
    ratios = ratio or ([] if config else [0.5])
    configs = {f"r={one:g}": FilterConfig.parse({"pruning_ratio": one, **shared}) for one in ratios}
    report = predict(deployment, configs | read_named_settings(config or []))
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_tables([capacity_table(report)])
        print(report["memory"]["sentence"])


# Flags that are not ours are vLLM's.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_PASS_ON)(serve)
app.command()(verify)
app.command(context_settings=_PASS_ON)(measure.bench)
app.command(name="eval")(measure.evaluate)
app.command()(measure.tune)
app.command()(plan)
app.command()(measure.inspect)


def main() -> None:
    """Run the command line; an error meant for the user ends in its sentence and exit status 2."""
    try:
        app()
    except TokenFilterError as error:
        print(f"vllm-tokenfilter: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
