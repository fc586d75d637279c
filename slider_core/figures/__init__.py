"""Images for people: plots, contact sheets, captions."""
