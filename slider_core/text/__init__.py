"""Text: from a prompt to the tokens of its instructions, and to a CONDITIONING that carries these spans."""
