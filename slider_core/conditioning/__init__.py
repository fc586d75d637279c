"""What a CONDITIONING carries for the pack: spans, strengths, masks and schedule ranges."""
