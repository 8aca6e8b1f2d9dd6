"""The entry point vLLM calls in every process; cheap, idempotent, never raises, inert unless selected.

Source: vllm/plugins/__init__.py (`load_general_plugins`): an exception here would kill vLLM.
"""

import logging


def register() -> None:
    """Make the backend's names known and let engine configurations be checked."""
    try:
        from vllm_tokenfilter.integration import registration, workarounds

        registration.register_names()
        workarounds.check_engine_configs()
        workarounds.extend_engine_core()
    except Exception:
        # vLLM must start without us; a deployment that selects the backend then hears "unknown backend".
        logging.getLogger("vllm.tokenfilter").exception("Token Filtering could not register and is not available.")
