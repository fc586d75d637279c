"""Stable Flow: vital layers, inversion, and what is cached of a source."""
