"""Where images come from, how they are prepared once, and how they are changed at random."""

__all__ = ["DataError", "augment", "download", "prepare", "sources", "synthetic"]


class DataError(ValueError):
    """Data or an augmentation that is missing, damaged or unsuitable; a line or two say what would do."""

    exit_status = 2
