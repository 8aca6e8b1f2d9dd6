"""vLLM driven in this process, for measuring and looking; nothing here runs in service."""
