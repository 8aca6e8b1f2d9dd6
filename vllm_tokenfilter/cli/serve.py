"""`vllm-tokenfilter serve`: vLLM's own OpenAI server, in this process, with the backend selected.

Works where vLLM's command does not: with the CPU package `vllm` dies at start, its distribution having another name.
"""

import os

from vllm_tokenfilter.errors import ConfigError
from vllm_tokenfilter.integration import plugin, versions, workarounds
from vllm_tokenfilter.integration.server.arguments import server_arguments, server_parser


def run(flags: list[str], config_files: list[str], pruning_ratio: float | None) -> None:
    """Serve until interrupted; see `server_arguments`.

    Raises:
        TokenFilterError: a setting cannot hold.
    """
    # What vLLM's own `main` does for `serve`.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    versions.cli_env_setup()
    plugin.register()
    arguments = server_arguments([*flags, *(f"--config={file}" for file in config_files)], pruning_ratio)
    # This command is the consent that vLLM asks for before a plugin may add routes.
    workarounds.name_metrics_plugin()
    if "VLLM_PLUGINS" in os.environ:
        os.environ["VLLM_PLUGINS"] += ",token_filtering_http"
    command = ServeSubcommand()
    try:
        parsed = server_parser().parse_args(arguments)
        configure_logging_from_args(parsed)
        command.validate(parsed)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses the flags: {error}") from error
    command.cmd(parsed)
