"""Sizes that arrays are made for, so that what is nearly as large shares what was compiled."""


def power_of_two(size: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(size - 1, 0).bit_length()
