"""The slider methods. Builds on ComfyUI's models, tokenizers and samplers; independent of nodes and the browser."""
