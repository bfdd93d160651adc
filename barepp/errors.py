"""Every exception that barepp raises on purpose; each message says what was wrong and what to do.

The transport's own errors live in `transport.errors` and pass through barepp unchanged.
"""


class BareppError(Exception):
    """Base of every error that barepp raises on purpose."""


class UsageError(BareppError, ValueError):
    """An argument, a flag or a combination of them that cannot work."""


class ScheduleError(UsageError):
    """A schedule that cannot run: unknown, or invalid for these stages, ranks and microbatches."""


class PartitionError(UsageError):
    """A model that cannot be cut into that many stages."""


class NobodyAnswers(BareppError):
    """No job is there to be asked, or its launcher does not answer."""


class JobEnded(NobodyAnswers):
    """The job that was asked has ended."""


class DataError(BareppError):
    """A data file that is missing, damaged or not what its reader expects."""
