"""Attention of rows to themselves, by one of several roads, and of a token to the slots of a cache."""
