"""Base models: loading, checking and building them."""
