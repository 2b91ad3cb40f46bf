"""The one exception that reaches the user as a single line and exit code 2."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """A mistake the user can mend: bad parameter, missing file, unusable data.

    The message says what is wrong, where, and what to do. `isim.cli` prints it without a
    traceback and exits with code 2.
    """


@contextlib.contextmanager
def renamed(section: str, own: str, *names: str) -> Iterator[None]:
    """Name parameters of the section `own` in errors of code that knows them as `section`'s.

    Args:
        section: The section that the errors name.
        own: The section of the stage that runs.
        names: The parameters that both have. What else begins with the section's name, such as a
            file, stays as it is.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        for name in names:
            text = text.replace(f"{section}.{name}", f"{own}.{name}")
        raise UserError(text) from error
