"""From a prompt to its spans of tokens, and to a CONDITIONING that carries them."""
