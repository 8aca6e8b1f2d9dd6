"""Token Filtering over vLLM's CPU attention backend."""
