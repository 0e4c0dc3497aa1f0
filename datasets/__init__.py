"""Find data sets, prepare their images once, and augment them at random."""

from collections.abc import Callable

Say = Callable[[str], None]  # receives one-line notes


class DataError(ValueError):
    """Data or an augmentation is missing, damaged or unsuitable; one or two lines say how to fix that."""

    exit_status = 2
