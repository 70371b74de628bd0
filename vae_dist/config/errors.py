"""The one error that is meant for the person who typed the command.

In: one problem or several, each a sentence that names key, value, rule and way out.
Out: an exception whose text lists them, one per line; commands print it without a traceback.
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
