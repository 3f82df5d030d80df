"""The error tree. Rooms raise these; only `qnext.cli` prints them, as two lines on stderr.

`message` says what is wrong, `hint` names the next command or step to try. Exit codes are a contract
(see README, "Exit codes"): scripts branch on them.
"""

from __future__ import annotations


class QnextError(Exception):
    """Base of every error a user may meet. `exit_code` is what the process ends with."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QnextError):
    """The command line or a settings file asks for something that has no meaning."""

    exit_code = 2


class HardwareError(QnextError):
    """The machine, or a recorded one, cannot be read or used."""

    exit_code = 3


class DoesNotFitError(QnextError):
    """No placement keeps every device inside its budget."""

    exit_code = 4


class ModelError(QnextError):
    """The model is missing, out of reach, or its file is broken."""

    exit_code = 5


class DownloadError(QnextError):
    """A transfer ended before the file was whole and verified."""

    exit_code = 6


class EngineError(QnextError):
    """llama.cpp refused, crashed, hung or is not installed."""

    exit_code = 7


class StoreError(QnextError):
    """The results database cannot be read or written."""

    exit_code = 8
