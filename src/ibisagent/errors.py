"""Every error that this package raises on purpose.

What a *model* writes is never an error: it is data on the episode (see `protocol.parse`). These are for what people
and machinery get wrong. Each message is one line: what was wrong, where, and what to do about it.
"""


class IbisError(Exception):
    """Base of all errors raised on purpose; the command line prints it in one line and exits with 2."""


class DataError(IbisError, ValueError):
    """An image, mask, record or data set cannot be used as it is."""


class TooLargeError(DataError):
    """A file holds, claims or unpacks to more than the limits allow; see `limits`."""


class ConfigError(IbisError, ValueError):
    """An option, model name, query or dialect that does not exist or does not fit."""


class SegmenterError(IbisError, RuntimeError):
    """The segmenter failed. Its episode is left out of training and never scored as zero."""


class PolicyError(IbisError, RuntimeError):
    """The policy's machinery (not its text) failed: no server, no weights, out of memory."""
