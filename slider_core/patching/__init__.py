"""How a model is changed: forwards of single modules, patched for one model call."""
