"""Token Filtering over vLLM's GPU attention backends."""
