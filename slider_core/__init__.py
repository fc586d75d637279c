"""The slider methods themselves. Knows ComfyUI's models and tokenizers, nothing about nodes or the browser."""
