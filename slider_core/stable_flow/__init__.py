"""Stable Flow (arXiv 2411.14430): vital layers, key/value injection, inversion, source KV cache."""
