"""The errors a user can meet. Each says what is wrong, where, and what is allowed."""


class AdoError(Exception):
    """Base of every named error. `exit_code` is what the process ends with."""

    exit_code = 1


class ConfigError(AdoError):
    """A key of `params.yaml` is unknown, of the wrong type, or out of range."""

    exit_code = 2


class DataError(AdoError):
    """An input dataset, or one file of it, cannot be used."""

    exit_code = 3


class ArtifactError(AdoError):
    """A stored model, checkpoint or report is missing, truncated, or not what its checksum says."""

    exit_code = 4


class StorageError(AdoError):
    """A path could not be read or written: disk full, no permission, not a directory."""

    exit_code = 5


class DivergenceError(AdoError):
    """A loss or a sample stopped being finite. Names the step and the last good checkpoint."""

    exit_code = 6


class StatisticsError(AdoError):
    """A figure cannot be computed from what was given: too few samples, a margin that is not positive."""

    exit_code = 7


class HardwareError(AdoError):
    """A measured task was asked for another machine's figures."""

    exit_code = 8


class RegistryError(AdoError):
    """MLflow could not be reached, or answered with an error, after retries with back-off."""

    exit_code = 9


class PromotionError(AdoError):
    """A version may not become the champion: refused, judged against another champion, or not what was judged."""

    exit_code = 10


class BudgetError(AdoError):
    """No way to sample keeps every limit that was given. Names the smallest limit that would do."""

    exit_code = 11
