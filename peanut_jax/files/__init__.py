"""What is on disk: folders, safetensors, the hub, checkpoints of PyTorch."""
