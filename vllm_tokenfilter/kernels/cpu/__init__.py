"""The CPU kernels: C sources, and beside them what they are handed."""
