"""The command `vllm-tokenfilter`."""

import sys
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
    mode (quick to start); pass --no-enforce-eager to compile it.
    """
    from vllm_tokenfilter.cli.serve import run

    run(context.args, config, pruning_ratio)


@app.command()
def verify(
    model: Annotated[str | None, typer.Option(help="Model to try; default: the embedded one.")] = None,
    pruning_ratio: Annotated[float, typer.Option(help="Ratio to try.")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove the installation: versions, dense and filtered generation side by side, what was filtered."""
    from vllm_tokenfilter.cli.verify import run

    raise typer.Exit(run(model, pruning_ratio, as_json))


def main() -> None:
    """Run the command line; an error meant for the user ends in its sentence and exit status 2."""
    try:
        app()
    except TokenFilterError as error:
        print(f"vllm-tokenfilter: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
