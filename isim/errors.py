"""The one exception that reaches the user as a single line and exit code 2."""


class UserError(Exception):
    """A mistake the user can mend: bad parameter, missing file, unusable data.

    The message says what is wrong, where, and what to do. `isim.cli` prints it without a
    traceback and exits with code 2.
    """
