"""Problems of a data set: all are found before any is told, and they are told by kind."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from isim.errors import UserError, one_line

# Where stage prepare lists all of them.
FILE = "reports/prepare/problems.csv"
# Lines of one kind, and in all, that an error shows.
MAX_OF_A_KIND, MAX_SHOWN = 8, 50


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        kind: A few words, the same for all findings that are alike.
        what: Line that tells what is wrong, where, and what to do.
        file: File that it is in, as it is written in `problems.csv`.
        error: The data cannot be used as it is; otherwise it is a warning.
    """

    kind: str
    what: str
    file: str = ""
    error: bool = True

    @property
    def severity(self) -> str:
        """`error` or `warning`."""
        return "error" if self.error else "warning"


def by_kind(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """Group problems by kind, in the order in which kinds first occur."""
    found: dict[str, list[Problem]] = {}
    for problem in problems:
        found.setdefault(problem.kind, []).append(problem)
    return found


def refuse(problems: Sequence[Problem]) -> None:
    """Raise a UserError if any of the problems is an error.

    A single one is told in one line. Otherwise the first line counts them; a few of each kind
    follow, a line each.
    """
    errors = [problem for problem in problems if problem.error]
    if not errors:
        return
    if len(errors) == 1:
        raise UserError(f"the data has 1 problem: {errors[0].what}")
    lines = [f"the data has {len(errors)} problems; mend it and run `isim prepare` again"]
    shown = 0
    for kind, found in by_kind(errors).items():
        room = max(0, min(MAX_OF_A_KIND, MAX_SHOWN - shown))
        lines += [problem.what for problem in found[:room]]
        shown += len(found[:room])
        if more := len(found[room:]):
            lines.append(f"and {more} more: {kind}")
    if shown < len(errors):
        lines.append(f"all of them are in {FILE}")
    raise UserError(*lines)


def warnings(problems: Iterable[Problem]) -> list[str]:
    """Put warnings into words: a line a kind, with their number and an example."""
    found = by_kind(problem for problem in problems if not problem.error)
    return [
        one_line(f"{kind}: {len(some)}, such as: {some[0].what}" if len(some) > 1 else some[0].what)
        for kind, some in found.items()
    ]


def rows(problems: Iterable[Problem]) -> list[dict[str, str]]:
    """List problems as rows of `problems.csv`: kind, severity, file, what."""
    return [
        {"kind": p.kind, "severity": p.severity, "file": p.file, "what": p.what} for p in problems
    ]
