"""The errors a command may end with; each carries the exit status of the process."""


class FastpruneError(Exception):
    """Base of every error this package raises on purpose. Its text is one line for the user."""

    exit_status = 1


class InputError(FastpruneError, ValueError):
    """Bad input or usage. The text says what is wrong and what to do about it."""

    exit_status = 2


class GateError(FastpruneError):
    """A measured condition was not met; nothing was overwritten."""

    exit_status = 3


class NumericalError(FastpruneError):
    """Non-finite weights, gradients or loss; the work was stopped before they were saved."""

    exit_status = 4
