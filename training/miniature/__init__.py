"""A miniature edit model for synthetic scenes, in which the effect of an edit can be measured exactly.

Scenes are a circle and a square on a plain background.
"""
