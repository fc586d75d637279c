"""How a model is changed: module forwards wrapped for single model calls, and LoRA branches beside its linears."""
