"""Strengths without an adapter, one method per file."""
