"""The commands that measure: bench, eval, tune and inspect."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vllm_tokenfilter.cli.output import print_tables, progress_bar, say_written, write_page_of
from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.local.paths import unwritable
from vllm_tokenfilter.reports.tables import benchmark_tables, evaluation_tables, tuning_tables


def bench(
    run_context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Path or Hugging Face id; default: the embedded model.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Prompt tokens; repeatable.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests sent together; repeatable.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Pruning ratio, a server for each; repeatable.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Interleaved repeats, after one to warm up.")] = None,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    url: Annotated[
        list[str] | None, typer.Option(help="Measure a running server instead; NAME=URL or URL; repeatable.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="API key of the servers.")] = None,
    out: Annotated[Path, typer.Option("--json", help="Result file; an interrupted run is continued.")] = Path(
        "bench.json"
    ),
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page.")] = None,
    quick: Annotated[bool, typer.Option(help="A first look: under three minutes on two cores.")] = False,
) -> None:
    """Measure speed, memory and capacity: stock vLLM against Token Filtering, interleaved over real servers.

    Further flags go to every server, as in `vllm serve`. Ratios are taken to the server called "stock".
    """
    from vllm_tokenfilter.bench.run import BenchmarkPlan, run
    from vllm_tokenfilter.local.models import default_model_path

    embedded = model is None and not url
    flags = list(run_context.args)
    if embedded:
        from vllm_tokenfilter.integration.server.arguments import embedded_defaults, read

        flags += embedded_defaults(read(flags), {"kv-cache-memory-bytes": str(1 << 30)})
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
    plan.check()
    _require_writable(html)
    with progress_bar() as progress:
        benchmark = run(plan, out, progress)
    print_tables(benchmark_tables(benchmark.model_dump(mode="json")))
    write_page_of(out, html)
    say_written(out, html)


def evaluate(
    model: Annotated[str | None, typer.Option(help="Path or Hugging Face id; default: the embedded model.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="How tokens are chosen, such as variance_aware or random; repeatable.")
    ] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Pruning ratio; repeatable.")] = None,
    window: Annotated[list[int] | None, typer.Option(help="Recent window in tokens; repeatable.")] = None,
    chunk_size: Annotated[list[int] | None, typer.Option(help="Tokens sealed together; repeatable.")] = None,
    dense_layer: Annotated[list[int] | None, typer.Option(help="A layer that keeps every token; repeatable.")] = None,
    config: Annotated[
        list[Path] | None, typer.Option(help="Also measure the settings of this vLLM --config file; repeatable.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="perplexity, tasks or recall; repeatable.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Perplexity window in tokens; repeatable.")] = None,
    windows: Annotated[
        int | None, typer.Option(min=0, help="Perplexity windows per length; 0: all. Default: 8.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="lm-eval task; repeatable. Default: the paper's seven.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows per task; default: all.")] = None,
    recall_length: Annotated[list[int] | None, typer.Option(help="Recall text in tokens; repeatable.")] = None,
    depth: Annotated[list[float] | None, typer.Option(help="Where the fact is hidden, 0 to 1; repeatable.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Recall question: passkey, key_value or copy; repeatable. Default: all.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Recall trials per kind, length, depth; default: 100.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random generator.")] = 0,
    text: Annotated[str | None, typer.Option(help="Text to read: wikitext2, builtin, or a UTF-8 file.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of task rows and text; see docs/evaluation.md.")] = None,
    out: Annotated[Path, typer.Option("--json", help="Result file; an existing one is continued.")] = Path("eval.json"),
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page.")] = None,
    quick: Annotated[
        bool, typer.Option(help="A first look in a few minutes: small samples of perplexity and recall.")
    ] = False,
) -> None:
    """Measure quality at equal budget: perplexity, the paper's tasks and recall; this method, baselines and dense."""
    from vllm_tokenfilter.evaluation.plan import EvaluationPlan
    from vllm_tokenfilter.evaluation.run import run
    from vllm_tokenfilter.evaluation.texts import load_text
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
        windows=windows if windows is not None else 4 if quick else 8,
        **({"task_names": task} if task else {}),
        limit=limit,
        recall_lengths=recall_length or ([700] if quick else [700, 1500]),
        depths=depth or ([0.5] if quick else [0.1, 0.5, 0.9]),
        **({"kinds": kind} if kind else {}),
        trials=trials or (16 if quick else 100),
        seed=seed,
        data_dir=data_dir,
    )
    plan.check()
    prose = load_text(text, data_dir)
    _require_writable(html)
    with progress_bar() as progress:
        evaluation = run(plan, prose, out, progress)
    print_tables(evaluation_tables(evaluation.model_dump(mode="json")))
    write_page_of(out, html)
    say_written(out, html)


def tune(
    out: Annotated[Path, typer.Option(help="The YAML file to write, for vLLM's --config.")],
    model: Annotated[str | None, typer.Option(help="Path or Hugging Face id; default: the embedded model.")] = None,
    ratio: Annotated[float, typer.Option(help="Mean pruning ratio over all layers; the result may be higher.")] = 0.5,
    length: Annotated[int, typer.Option(help="Tokens of each text.")] = 1500,
    trials: Annotated[int, typer.Option(min=1, help="Questions per kind and depth.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the questions and of the windows of text.")] = 1000,
    text: Annotated[str | None, typer.Option(help="Text to read: wikitext2, builtin, or a UTF-8 file.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with local text; see docs/evaluation.md.")] = None,
    device: Annotated[str | None, typer.Option(help="PyTorch device; default: a GPU if there is one.")] = None,
    out_json: Annotated[Path | None, typer.Option("--json", help="Also write every trial to this file.")] = None,
    reuse: Annotated[
        Path | None, typer.Option(help="Take the layers' trials from such a file: another ratio takes a minute.")
    ] = None,
) -> None:
    """Find a model's retrieval layers once, and write the settings that prune the others; needs no data of yours."""
    from vllm_tokenfilter.tuning.run import TuningRequest, run

    request = TuningRequest(model, ratio, length, trials, seed, text, data_dir, device, out, out_json, reuse)
    with progress_bar() as progress:
        tuning = run(request, progress)
    print_tables(tuning_tables(tuning.model_dump(mode="json")))
    say_written(out, out_json)


def inspect(
    text: Annotated[Path, typer.Option(help="The text: a UTF-8 file.")],
    html: Annotated[Path, typer.Option(help="The page to write: one self-contained HTML file.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the model's chat template; the file may be a JSON list of messages.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Path or Hugging Face id; default: the embedded model.")] = None,
    ratio: Annotated[float, typer.Option(help="Pruning ratio.")] = 0.5,
    window: Annotated[int, typer.Option(help="Recent window in tokens.")] = 64,
    chunk_size: Annotated[int, typer.Option(help="Tokens sealed together.")] = 64,
    dense_layer: Annotated[list[int] | None, typer.Option(help="A layer that keeps every token; repeatable.")] = None,
    limit: Annotated[int, typer.Option(help="Most tokens of the text to read.")] = 2048,
    step: Annotated[int, typer.Option(help="Tokens read at once; 1 is exactly what decoding sees, but slow.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show what is removed from one text: a page of its tokens, layers, similarities and changed predictions."""
    from vllm_tokenfilter.config import FilterConfig
    from vllm_tokenfilter.inspection.run import InspectionRequest, run

    sizes = {"chunk_size": chunk_size, "recent_window": window, "anchor_terms": min(chunk_size, 64)}
    config = FilterConfig.parse({"pruning_ratio": ratio, "dense_layers": dense_layer or [], **sizes})
    with progress_bar() as progress:
        figures = run(InspectionRequest(text, chat, model, limit, step, html, config), progress)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name.replace('_', ' '):22} {value:.4g}")
    say_written(html)


def _require_writable(html: Path | None) -> None:
    if reasons := unwritable(html=html):
        raise EvaluationError(reasons)
