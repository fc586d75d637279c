"""What the pack's own samplers share."""
