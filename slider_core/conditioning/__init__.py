"""What travels with a CONDITIONING: strengths, masks and schedule ranges."""
