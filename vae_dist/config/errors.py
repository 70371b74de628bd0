"""The errors that are meant for the user, who gets no traceback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


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


def merged_over_ranks(errors: Mapping[int, ConfigError], *, num_asked: int) -> ConfigError:
    """One error from those of some ranks; its lines name them unless all that were asked agree."""
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for rank, error in errors.items():
        ranks_of.setdefault(error.problems, []).append(rank)
    problems: list[str] = []
    for (first, *rest), ranks in ranks_of.items():
        is_of_all = len(ranks) == num_asked
        problems += [first if is_of_all else f"{name_ranks(ranks)}: {first}", *rest]
    return ConfigError(problems)


def name_ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
