"""What the accelerator at hand does: peaks, train steps, attention, decoding, files. See `__main__`."""
