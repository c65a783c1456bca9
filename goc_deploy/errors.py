"""Every error that goc_deploy raises on purpose.

    GocError                        exit code
    ├── UsageError                  2   bad option, SPEC, label, latents
    │   ├── ScheduleError           2   a schedule that breaks a rule of legality
    │   └── CalibrationNeededError  2   a policy that learns from an engine that is not there
    ├── ModelError                  3   checkpoint unreadable or unsupported
    ├── EngineDirError              4   engine directory corrupt or not ours
    ├── EnvironmentUnsupportedError 5   provider, GPU, versions, driver
    │   └── NotReadyError           5   a service that loads, drains or is closed
    ├── VerificationError           6   numbers beyond tolerance, non-finite results
    ├── ResourceError               7   disk, memory, file descriptors
    │   └── OverloadedError         7   a service whose queue is full
    ├── ConflictError               8   output exists, lock held
    ├── SafetyError                 9   pickle globals, path escape
    ├── CancelledError              10  a call whose token was cancelled
    └── DeadlineError               11  a call that took longer than its deadline

A message is one sentence that states what is wrong, where, and what to do.
"""

from __future__ import annotations


class GocError(Exception):
    """Base of all errors that goc_deploy raises on purpose."""

    exit_code = 1


class UsageError(GocError):
    """A bad option, SPEC, label, shape or number."""

    exit_code = 2


class ScheduleError(UsageError):
    """A schedule that breaks a rule of legality, or does not fit the model."""


class CalibrationNeededError(UsageError):
    """A policy needs images from an engine, but there is no engine to run."""


class ModelError(GocError):
    """A checkpoint that cannot be read or is not supported."""

    exit_code = 3


class EngineDirError(GocError):
    """An engine directory that is corrupt, incomplete, too new, or not ours."""

    exit_code = 4


class EnvironmentUnsupportedError(GocError):
    """A missing provider, device, package or driver."""

    exit_code = 5


class NotReadyError(EnvironmentUnsupportedError):
    """A service that has not started, drains or is closed."""


class VerificationError(GocError):
    """Numbers beyond tolerance, or results that are not finite."""

    exit_code = 6


class ResourceError(GocError):
    """Not enough disk, memory or file descriptors."""

    exit_code = 7


class OverloadedError(ResourceError):
    """The queue of a service is full.

    Attributes:
        retry_after: estimated seconds until there is room.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[OverloadedError], tuple[str, float]]:
        return type(self), (str(self), self.retry_after)


class ConflictError(GocError):
    """The output exists or another process holds the lock."""

    exit_code = 8


class SafetyError(GocError):
    """Input that would run code or leave its directory."""

    exit_code = 9


class CancelledError(GocError):
    """The caller cancelled the call through its token."""

    exit_code = 10


class DeadlineError(GocError):
    """The call did not end within its deadline."""

    exit_code = 11
