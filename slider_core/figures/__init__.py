"""Pictures for people: plots, contact sheets, captions."""
