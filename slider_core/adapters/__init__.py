"""Trained adapters: reading their files, and applying them at a strength."""
