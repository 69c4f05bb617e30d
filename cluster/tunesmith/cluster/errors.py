"""The one error tree: what happened, with the numbers, and what to do about it.

Exit codes: 0 done, 1 failed, 2 the recipe or the command is wrong, 75 stopped but saved (run it again to go on),
130 interrupted, 143 stopped at once by a second SIGTERM.
"""

from __future__ import annotations


class TunesmithError(Exception):
    """Root of every error a user may meet.

    Args:
        what: what happened, with the names and numbers that show it.
        fix: what to do next, as a sentence; empty when `what` already says it.

    Both are positional so that the error survives pickling between a worker and the driver.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n{self.fix}" if self.fix else self.what


class UsageError(TunesmithError):
    """The recipe, its data or the command is wrong; nothing was run."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe key is misspelt, of a wrong type, contradictory, or was never read."""


class DataError(UsageError):
    """A data file is missing, empty, unreadable, or holds too many rows that cannot be used."""


class ModelError(UsageError):
    """The base model cannot be found, lacks a tokenizer, or does not fit the adaptation."""


class ResourceError(UsageError):
    """The cluster has fewer GPUs, CPUs or bytes than the recipe asks for."""


class LostHeadError(ResourceError):
    """The head of the cluster that was joined does not answer."""


class FleetError(UsageError):
    """A fleet names no known GPU, has an impossible shape, or its file has a mistake."""


class ServeConfigError(UsageError):
    """A key of a serving configuration is misspelt, of a wrong type or contradictory."""


class ServeError(TunesmithError):
    """A part of the service does not start."""


class AdapterError(UsageError):
    """An adapter may not enter the registry, or an engine cannot serve it."""


class RegistryError(UsageError):
    """No such adapter, alias or version, or one that may not be changed like that."""


class UnknownError(RegistryError):
    """There is no such adapter, alias or version."""


class MovedError(RegistryError):
    """The registry is not as it was when the change was decided: somebody else has changed it meanwhile."""


class RequestError(TunesmithError):
    """A client's request cannot be answered as it stands.

    Args:
        status: of the HTTP answer.
        param: the field of the request that is wrong.
        code: a word for programs.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        what: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(what)
        self.args = (what, status, param, code, retry_after)  # what pickling calls the class with
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


class OutOfMemoryError(ResourceError):
    """The run's largest batch does not fit the device; found before its first step."""


class OutputError(UsageError):
    """The output folder cannot be written."""


class RunBusyError(UsageError):
    """Another process is already at work on the run of this name."""


class ChangedError(UsageError):
    """A run was asked to resume with another recipe or other data than it began with."""


class PlanError(TunesmithError):
    """A model cannot be simulated, although it may train."""


class StorageError(TunesmithError):
    """Reading or writing storage failed."""


class DiskFullError(StorageError):
    """A write did not fit; names the path, the bytes needed and the bytes free."""


class CheckpointError(TunesmithError):
    """No whole checkpoint could be read or written."""


class FencedError(TunesmithError):
    """A newer attempt at the same run has started; this one may not write any more."""


class NonFiniteError(TunesmithError):
    """A loss or gradient was NaN or infinite; no weight was changed by it."""


class ReceiptError(TunesmithError):
    """A receipt failed: the mask trained the wrong tokens, or the artifact is not the model that was trained."""


class WorkerError(TunesmithError):
    """Workers kept failing without making progress."""


class StoppedError(TunesmithError):
    """The run was asked to stop and saved itself; the same command goes on from there."""

    exit_code = 75


class StoppedAtOnceError(TunesmithError):
    """SIGTERM came twice: the run was ended without saving; what was saved before stays."""

    exit_code = 143


class InterruptedRunError(TunesmithError):
    """The run was interrupted from the keyboard; what was saved before stays."""

    exit_code = 130
