"""The errors that are meant for the user, who gets no traceback."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class ConfigError(ValueError):
    """One or more `problems` with what was asked for, a sentence each: key, value, rule, remedy."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        # Loader workers and test ranks send exceptions by pickle; keep the list whole.
        return type(self), (self.problems,)


class CommandFailed(Exception):
    """The command was right, and something else went wrong; the text says what to do."""


def name_ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
