"""Where images come from, how they are prepared once, and how they are changed at random."""

from collections.abc import Callable

Say = Callable[[str], None]  # receives notes of one line


class DataError(ValueError):
    """Data or an augmentation that is missing, damaged or unsuitable; a line or two say what would do."""

    exit_status = 2
