"""Serving performance: stock vLLM and Token Filtering, real servers over HTTP, interleaved in one invocation."""
