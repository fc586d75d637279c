"""Trained adapters: their files, and how a strength scales them."""
