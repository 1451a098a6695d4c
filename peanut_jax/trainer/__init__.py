"""Training from a config: what `peanut-jax train` runs."""
