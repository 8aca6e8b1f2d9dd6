"""What tests lean on and vLLM 0.33 moved. With 0.32, import it where it is used."""

from vllm_tokenfilter.integration import versions

# Planning of KV-cache groups.
if versions._SINCE_33:
    from vllm.v1.core import kv_cache_planning as planning
else:
    from vllm.v1.core import kv_cache_utils as planning

__all__ = ["planning"]
