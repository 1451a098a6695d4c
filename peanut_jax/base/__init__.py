"""The frozen model: what a kernel is, which ones a config means, what PyTorch calls them."""
