"""A world made by code, in which what an edit does is known as numbers: a circle and a square on a plain ground."""
