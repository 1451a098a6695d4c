"""Roads in and out: HF PEFT adapters, LoRA, and PyTorch checkpoints. Foreign names live only here; no torch."""
