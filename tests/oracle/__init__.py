"""Outside opinions on the numbers: plain NumPy, and HF PEFT on tiny random models."""
