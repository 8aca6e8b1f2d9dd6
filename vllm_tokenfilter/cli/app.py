"""The command `vllm-tokenfilter`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_tokenfilter import __version__
from vllm_tokenfilter.errors import TokenFilterError

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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    config: Annotated[str | None, typer.Option(help="A vLLM --config file, such as those in configs/.")] = None,
    pruning_ratio: Annotated[
        float | None, typer.Option(help="Share of each sealed chunk that leaves the KV cache; wins over the file.")
    ] = None,
) -> None:
    """Run vLLM's OpenAI-compatible server with Token Filtering on; any vLLM server flag can follow.

    Without a model it serves SmolLM2-135M-Instruct, which is made ready on the first start, on 127.0.0.1 and in eager
    mode (quick to start); pass --no-enforce-eager to compile it. Unless told how, it then prunes the layers that
    `tune` found to need it least, to half of the cache as a mean over all.
    """
    from vllm_tokenfilter.cli.serve import run

    run(context.args, config, pruning_ratio)


@app.command()
def verify(
    model: Annotated[str | None, typer.Option(help="Model to try; default: the embedded one.")] = None,
    pruning_ratio: Annotated[float, typer.Option(help="Ratio to try; without effect beside --config.")] = 0.5,
    config: Annotated[Path | None, typer.Option(help="Try the settings of this vLLM --config file instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove the installation: versions, dense and filtered generation side by side, what was filtered."""
    from vllm_tokenfilter.cli.verify import run
    from vllm_tokenfilter.config import FilterConfig
    from vllm_tokenfilter.local.settings_file import read_settings

    settings = FilterConfig.parse({"pruning_ratio": pruning_ratio}) if config is None else read_settings(config)
    raise typer.Exit(run(model, settings, as_json))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    run_context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Path or Hugging Face id; default: the embedded model.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Prompt tokens; repeatable.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests sent together; repeatable.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Pruning ratio, a server each; repeatable.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Interleaved repeats; one more warms up.")] = None,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    url: Annotated[
        list[str] | None, typer.Option(help="Measure a running server instead; NAME=URL or URL; repeatable.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Of running servers.")] = None,
    out: Annotated[Path, typer.Option("--json", help="Result file; one of the same grid is continued.")] = Path(
        "bench.json"
    ),
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page.")] = None,
    quick: Annotated[bool, typer.Option(help="A look in under three minutes on two cores.")] = False,
) -> None:
    """Measure speed, memory and capacity: stock vLLM against Token Filtering, interleaved over real servers.

    Further flags go to every server, as in `vllm serve`. A server called "stock" is what ratios are taken to.
    """
    from vllm_tokenfilter.bench.run import BenchmarkPlan
    from vllm_tokenfilter.cli.bench import bench as measure
    from vllm_tokenfilter.local.models import default_model_path

    embedded = model is None and not url
    flags = list(run_context.args)
    if embedded and not {"--enforce-eager", "--no-enforce-eager"} & set(flags):
        flags.append("--enforce-eager")
    if embedded and not any(flag.startswith("--kv-cache-memory-bytes") for flag in flags):
        flags += ["--kv-cache-memory-bytes", str(1 << 30)]
    urls: dict[str, str] = {}
    for entry in url or []:
        name, equals, address = entry.partition("=")
        named = bool(equals) and "/" not in name
        urls[name if named else "server"] = address if named else entry
    plan = BenchmarkPlan(
        model=str(default_model_path()) if embedded else model or "",
        contexts=context or ([1024] if quick else [512, 4000]),
        concurrencies=concurrency or ([4] if quick else [1, 8]),
        ratios=ratio or ([0.5] if quick else [0.5, 0.75]),
        repeats=repeats or 3,
        output_tokens=output_tokens,
        server_flags=flags,
        urls=urls,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
    )
    measure(plan, out, html)


@app.command(name="eval")
def evaluate(
    model: Annotated[str | None, typer.Option(help="Path or Hugging Face id; default: the embedded model.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="How tokens are chosen; repeatable.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Pruning ratio; repeatable.")] = None,
    window: Annotated[list[int] | None, typer.Option(help="Recent window in tokens; repeatable.")] = None,
    chunk_size: Annotated[list[int] | None, typer.Option(help="Tokens sealed together; repeatable.")] = None,
    dense_layer: Annotated[list[int] | None, typer.Option(help="A layer kept whole; repeatable.")] = None,
    config: Annotated[
        list[Path] | None, typer.Option(help="Also measure the settings of this vLLM --config file; repeatable.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="perplexity, tasks or recall; repeatable.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Perplexity window in tokens; repeatable.")] = None,
    windows: Annotated[int, typer.Option(min=0, help="Perplexity windows per length; 0 for all.")] = 8,
    task: Annotated[
        list[str] | None, typer.Option(help="lm-eval task; repeatable. Default: the paper's seven.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows per task; default: all.")] = None,
    recall_length: Annotated[list[int] | None, typer.Option(help="Recall text in tokens; repeatable.")] = None,
    depth: Annotated[list[float] | None, typer.Option(help="Where the fact stands, 0 to 1; repeatable.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Recall question: passkey, key_value or copy; repeatable. Default: all.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Recall trials per kind, length and depth.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of every generator.")] = 0,
    text: Annotated[str | None, typer.Option(help="wikitext2, builtin, or a UTF-8 file.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local task rows and text; see docs/evaluation.md.")] = None,
    out: Annotated[Path, typer.Option("--json", help="Result file; an existing one is continued.")] = Path("eval.json"),
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page.")] = None,
    quick: Annotated[
        bool, typer.Option(help="A look in a few minutes: small samples of perplexity and recall.")
    ] = False,
) -> None:
    """Measure quality at equal budget: perplexity, the paper's tasks, recall; ours, rival methods and dense."""
    from vllm_tokenfilter.cli.evaluate import evaluate as measure
    from vllm_tokenfilter.evaluation.run import EvaluationPlan
    from vllm_tokenfilter.local.models import default_model_path
    from vllm_tokenfilter.local.settings_file import read_named_settings

    # Files are measured by themselves unless a grid is asked for as well.
    ratios = [0.5] if quick else [] if config else [0.25, 0.5, 0.75]
    plan = EvaluationPlan(
        model=model or str(default_model_path()),
        methods=method or (["variance_aware", "random"] if quick else ["variance_aware"]),
        ratios=ratio or ratios,
        configs=read_named_settings(config or []),
        recent_windows=window or [64],
        chunk_sizes=chunk_size or [64],
        extra={"dense_layers": dense_layer} if dense_layer else {},
        metrics=metric or (["perplexity", "recall"] if quick else ["perplexity", "tasks", "recall"]),
        lengths=length or ([1024] if quick else [128, 2048]),
        windows=4 if quick else windows,
        **({"task_names": task} if task else {}),
        limit=limit,
        recall_lengths=recall_length or ([700] if quick else [700, 1500]),
        depths=depth or ([0.5] if quick else [0.1, 0.5, 0.9]),
        **({"kinds": kind} if kind else {}),
        trials=16 if quick else trials,
        seed=seed,
        data_dir=data_dir,
    )
    measure(plan, text, out, html)


@app.command()
def tune(
    out: Annotated[Path, typer.Option(help="The YAML file to write, for vLLM's --config.")],
    model: Annotated[str | None, typer.Option(help="Path or Hugging Face id; default: the embedded model.")] = None,
    ratio: Annotated[float, typer.Option(help="Mean pruning ratio over all layers, at least.")] = 0.5,
    length: Annotated[int, typer.Option(help="Tokens of each text.")] = 1500,
    trials: Annotated[int, typer.Option(min=1, help="Questions per kind and depth.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the questions and of the windows of text.")] = 1000,
    text: Annotated[str | None, typer.Option(help="wikitext2, builtin, or a UTF-8 file.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local text; see docs/evaluation.md.")] = None,
    device: Annotated[str | None, typer.Option(help="Of PyTorch; default: a GPU if there is one.")] = None,
    out_json: Annotated[Path | None, typer.Option("--json", help="Also write every trial.")] = None,
    reuse: Annotated[
        Path | None, typer.Option(help="Take the layers' trials from such a file: another ratio in a minute.")
    ] = None,
) -> None:
    """Find once per model which layers recall, and write the settings that prune the others: no user data needed."""
    from vllm_tokenfilter.cli.tune import Request, run

    run(Request(model, ratio, length, trials, seed, text, data_dir, device, out, out_json, reuse))


@app.command()
def plan(
    model_config: Annotated[str, typer.Option(help="A config.json, a folder that holds one, or a Hugging Face id.")],
    context: Annotated[int, typer.Option(help="The longest request, in tokens: vLLM's max_model_len.")],
    gpu_memory: Annotated[float | None, typer.Option(help="Of one GPU, in GiB.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Pruning ratio; repeatable.")] = None,
    config: Annotated[
        list[Path] | None, typer.Option(help="Also the settings of this vLLM --config file; repeatable.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs that share the model.")] = 1,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU that vLLM takes.")] = 0.92,
    overhead: Annotated[float, typer.Option(help="GiB a GPU for activations, CUDA graphs and libraries.")] = 2.0,
    weights: Annotated[float | None, typer.Option(help="GiB of the whole model; default: found out.")] = None,
    kv_cache: Annotated[
        float | None, typer.Option(help="GiB a GPU of KV cache, where known; nothing is deducted.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and KV cache: auto, bfloat16, float16, float32.")] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens of a block: 16 on GPUs, 32 on CPU.")] = 16,
    prefill_step: Annotated[int, typer.Option(help="The most prompt tokens of a step.")] = 512,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens sealed together.")] = None,
    recent_window: Annotated[int | None, typer.Option(help="Newest tokens that stay whole.")] = None,
    first_layer: Annotated[int, typer.Option(help="First filtered layer.")] = 0,
    dense_layer: Annotated[list[int] | None, typer.Option(help="A layer kept whole; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict how many requests fit and what a token costs, dense and filtered, as vLLM counts at start."""
    from vllm_tokenfilter.cli.plan import Deployment, plan
    from vllm_tokenfilter.config import FilterConfig
    from vllm_tokenfilter.local.settings_file import read_named_settings

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
    plan(deployment, configs | read_named_settings(config or []), as_json)


@app.command()
def inspect(
    text: Annotated[Path, typer.Option(help="UTF-8 file.")],
    html: Annotated[Path, typer.Option(help="The page to write; self-contained.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the model's chat template; the file may be a JSON list of messages.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Path or Hugging Face id; default: the embedded model.")] = None,
    ratio: Annotated[float, typer.Option(help="Pruning ratio.")] = 0.5,
    window: Annotated[int, typer.Option(help="Recent window in tokens.")] = 64,
    chunk_size: Annotated[int, typer.Option(help="Tokens sealed together.")] = 64,
    dense_layer: Annotated[list[int] | None, typer.Option(help="A layer kept whole; repeatable.")] = None,
    limit: Annotated[int, typer.Option(help="Tokens of the text that are read.")] = 2048,
    step: Annotated[int, typer.Option(help="Tokens read at once; 1 is exactly what decoding sees, and slow.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """See what is dropped from one text: a page of its tokens, layers, similarities and changed predictions."""
    from vllm_tokenfilter.cli.inspect import Request, inspect
    from vllm_tokenfilter.config import FilterConfig

    sizes = {"chunk_size": chunk_size, "recent_window": window, "anchor_terms": min(chunk_size, 64)}
    config = FilterConfig.parse({"pruning_ratio": ratio, "dense_layers": dense_layer or [], **sizes})
    inspect(Request(text, chat, model, limit, step, html, as_json), config)


def main() -> None:
    """Run the command line; an error meant for the user ends in its sentence and exit status 2."""
    try:
        app()
    except TokenFilterError as error:
        print(f"vllm-tokenfilter: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
