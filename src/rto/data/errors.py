"""What bad data raises; a module of its own because readers of results need it and no model library."""


class DataError(ValueError):
    """A data set that cannot be used; the message names the file, row or column and the remedy."""
