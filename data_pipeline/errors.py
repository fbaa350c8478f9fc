"""Errors a user can mend. Standard library only: every room may import this leaf.

The message says what was wrong, where (file, key, line) and what would be right. The command line prints it
without a traceback and exits 2; any other exception is a bug and keeps its traceback.
"""

from data_pipeline.secret import redact


class UserError(Exception):
    """Base of all mistakes that the user, not the code, can mend. Its text shows no secret, whoever wrote it."""

    def __str__(self) -> str:
        return redact(super().__str__())


class ConfigError(UserError):
    """A configuration file, override or combination of values that cannot be used."""


class DataError(UserError):
    """A corpus, tokenizer or dataset that is missing, damaged or unsuitable."""


class RunError(UserError):
    """A run folder that is owned by someone else or belongs to another run."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or cannot be written."""
