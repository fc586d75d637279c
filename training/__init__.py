"""Trains the adapters that the nodes load: STLoRA, GSTLoRA and strength projectors. Run `python -m training`."""
