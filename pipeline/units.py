"""Sizes that many rooms share, and how sizes are rounded. No torch here."""

GIB = 2**30  # bytes
FP8_BLOCK = 128  # rows and columns of a matrix in FP8 that share a scale (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)


def round_up(number: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``number``."""
    return -(-number // multiple) * multiple
