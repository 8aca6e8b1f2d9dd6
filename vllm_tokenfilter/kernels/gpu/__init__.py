"""The GPU kernels in Triton, and beside them what they are handed."""
