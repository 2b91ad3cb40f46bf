"""The one exception that reaches the user as a single line and exit code 2."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """A mistake the user can mend: bad parameter, missing file, unusable data.

    The message says what is wrong, where, and what to do. `isim.cli` prints it without a
    traceback and exits with code 2.
    """


@contextlib.contextmanager
def renamed(section: str, own: str) -> Iterator[None]:
    """Name parameters of the section `own` in errors of code that knows them as `section`'s."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"{section}.", f"{own}.")) from error
