"""Token Filtering for vLLM: prune redundant tokens from the paged KV cache while requests decode.

Importing this package loads nothing heavy: neither torch nor vLLM.
"""

__version__ = "0.1.0"
