"""Sliders without trained weights, one method per file."""
