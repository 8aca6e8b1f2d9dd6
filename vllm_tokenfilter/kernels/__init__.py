"""Kernels: tensors, strides and integers in, nothing else; no configuration, no request, no vLLM type."""
