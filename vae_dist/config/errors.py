"""The errors that are meant for the person who typed the command, who gets no traceback.

ConfigError: one problem or several with what was asked for, each a sentence that names key, value,
rule and way out; its text lists them, one per line. CommandFailed: what ended it on the way.
"""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """One or more problems with what the user asked for; `problems` holds them in order."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        assert self.problems, "a ConfigError without a problem"
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        # Loader workers and test ranks send exceptions by pickle; keep the list whole.
        return type(self), (self.problems,)


class CommandFailed(Exception):
    """The command was right, and something else went wrong; the text says what to do."""
