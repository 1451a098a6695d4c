"""How a model's modules meet their updates; one file a module library."""
