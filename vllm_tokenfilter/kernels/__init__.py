"""Kernels and their launchers: compiled kernels take tensors, strides and numbers only; nothing here knows vLLM."""
