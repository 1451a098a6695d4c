"""Tasks: one file a kind. `base` says what a task of your own must offer."""
