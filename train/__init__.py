"""The application: what is run from a checkout, on top of the installed `peanut_jax`."""
