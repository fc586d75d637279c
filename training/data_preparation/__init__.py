"""python -m training prepare: renders edit strips for training a strength projector, on running ComfyUI servers."""
