"""python -m training prepare: edits at several strengths, rendered by ComfyUI servers, as data for a projector."""
