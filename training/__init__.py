"""Makes the adapters that the nodes load: STLoRA, GSTLoRA and strength projectors. Run as `python -m training`."""
