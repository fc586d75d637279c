"""Metrics of sweeps: image distances, smoothness, calibration."""
