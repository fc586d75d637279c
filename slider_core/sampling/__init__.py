"""Sampling: sigmas, checks for flow matching and samplers, sampling loops."""
