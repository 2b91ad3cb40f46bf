"""Errors that reach the user as one line with exit code 2, and the boundary that all readers share.

Files come from anywhere: a reader opens them by `opened`, `contents` or `text`, which take regular
files of a bounded size alone, and stands inside `reading`, which turns whatever its parsers stumble
over into one line that names the file and what to do. Whatever leaves the process in words
(messages, logs, tags, tables) goes through `without_secrets`.
"""

import contextlib
import io
import json
import os
import re
import stat
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, unquote

# Characters of a message, and of a value that a parser's own words may quote.
LONGEST, _QUOTED = 285, 100
# Characters of a name in a picture.
_DRAWN = 40
# Bytes of small files (JSON, lists of a project), of tables and lists of people, and of any file.
SMALL, TABLE, LARGE = 64 << 20, 256 << 20, 64 << 30
# Characters of a line of a list or a table.
LINE = 1 << 20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# What stands in the place of a secret.
HIDDEN = "***"
# Words that nothing else than a secret stands behind, be it after = or after a colon.
_SURE = (
    r"pass(?:word|wd|phrase)|secret|(?:api|private|secret|access)[-_ ]?key|access[-_]?key[-_]?id"
)
# Those behind which other things stand, too: a number, or such as [PAD] and <s>.
_OTHER = r"""(?!\\?['"]?(?:[\[<({]|\d{1,5}(?![\w.-]))|/)"""
_PLAIN = ("true", "false", "none", "null", "yes", "no", "auto")
# A quoted value ends with its line at the latest: the other quote may have been cut off.
_VALUE = (
    r'"[^"\\\n]*(?:\\.[^"\\\n]*)*(?:"|\\?(?=\n|\Z))'
    r"|'[^'\\\n]*(?:\\.[^'\\\n]*)*(?:'|\\?(?=\n|\Z))"
    r"|\\[\"'][^\"'\n]*[\"']?"
    r"|[^\s&#'\",;]+"
)
# Like all patterns here, these take a time that grows as the text does: they begin with a word of
# their own, and what follows it has a bound or cannot hold such a beginning twice.
_NAMED = re.compile(
    rf"""(?i)(
        (?:{_SURE})\\?['"]?[ \t]{{0,8}}[=:](?!=)[ \t]{{0,8}}
        |(?:token|credentials?|(?<![a-z0-9])pwd)\\?['"]?[ \t]{{0,8}}=(?!=)[ \t]{{0,8}}{_OTHER}
        |(?:token|credentials?)\\?['"][ \t]{{0,8}}:[ \t]{{0,8}}(?=\\?['"][^\s'"]{{6}}){_OTHER}
        |(?:(?<=[?&;])sig|signature)=(?=[\w%+/=.~-]{{16}})
        |(?<=[?&])auth=
    )(?!(?:{"|".join(_PLAIN)})(?:[\s,;)\]}}&]|\Z))({_VALUE})""",
    re.VERBOSE,
)
_HEADER = re.compile(
    r"""(?i)(authorization\\?['"]?\s{0,8}[=:,]\s{0,8}b?\\?['"]?"""
    r"(?:basic|bearer|digest|negotiate|token)\s{1,8})[\w+/=.~-]{6,}"
)
# Without that word: only what looks like no word, with letters of both cases and digits.
_TOKEN = re.compile(
    r"\b([Bb]asic|[Bb]earer|BASIC|BEARER)(\s{1,8})"
    r"(?=[^\d\s]{0,200}\d)(?=[^a-z\s]{0,200}[a-z])(?=[^A-Z\s]{0,200}[A-Z])[\w+/=.~-]{24,}"
)
# User of an address, either with the colon before its password or alone.
_USER = re.compile(r"(?<=[\w+.-]://)(?:([^/:'\"]*:)|[^/'\"]+@)")
# A password with blanks; what follows a port is none.
_BLANKS = re.compile(
    r"(?<=[\w+.-]://)[^\s/:@'\"]{0,100}:(?!\d{1,5}(?!\w))[^\s/@'\"]{1,100}"
    r"(?:[ ][^\s/:@'\"]{1,100}){1,3}@(?=[\w\[])"
)
# What a stream takes as it is are line ends and tabs, and what a bar writes that has others above.
_WITHIN, _LINES_UP = re.compile(r"[^\n\r\t]+"), re.compile(r"(?:\x1b\[A)+")
# Environment variables that hold nothing else.
_VARIABLE = re.compile(rf"(?i)(?:{_SURE}|token|credentials?|(?:^|_)(?:pwd|pass))$")
# Characters of a secret of the environment, of its pieces, and of a user who may be a token, below
# which they are not looked for: they would be found in honest words.
_LEAST, _LEAST_PIECE, _LEAST_USER = 4, 6, 8
# Words that are no secret even where they stand for one: of this program, and of its messages.
_WORDS = """
    prepare train_cam export_cams train_affinity random_walk train_segmenter masks evaluate report
    dense_walk label_sets params labels label images image predict preset project experiment
    experiments ground_truth last_round random_walk_crf seeds shapes folder train test isim mlflow
    default master origin github gitlab postgres postgresql mysql sqlite localhost server admin root
    password passwd secret token access account anonymous nobody guest user users username http
    https error errors warning cannot missing python string object module number threshold segmenter
    affinity epochs rounds metrics checkpoint resnet50 scratch imagenet config data home file files
    init plan upgrade results masks_wanted wanted tables compare export server_archive archive
    random walk cams
"""
_HONEST = frozenset(_WORDS.split()) | set(_PLAIN)


class UserError(Exception):
    """A mistake the user can mend: bad parameter, missing file, unusable data.

    The message says what is wrong, where, and what to do. `isim.cli` prints it without a
    traceback and exits with code 2. As a text it is one line of `LONGEST` characters at most; each
    of the `details`, where there are any, is one more line.
    """

    def __init__(self, message: str, *details: str) -> None:
        """Keep the lines as they are given."""
        super().__init__(message, *details)

    def __str__(self) -> str:
        """Return the message as `one_line` makes it, and the details below it."""
        return "\n  ".join(one_line(str(part)) for part in self.args)


def printable(text: str) -> str:
    r"""Write control characters, those that turn text around, and lone surrogates as \x1b.

    A file's name must neither steer a terminal nor begin a line of its own.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def drawable(name: str, glyphs: Container[int]) -> str:
    """Return a name, cut if it is long, as a font that has these code points draws it.

    A character that the font has not, or that is none to see, is its code point.
    """
    shown = cut(name, _DRAWN)
    return "".join(c if c.isprintable() and ord(c) in glyphs else f"\\u{ord(c):04x}" for c in shown)


def one_line(text: str, longest: int = LONGEST) -> str:
    """Return a text as one printable line of at most `longest` characters.

    The middle of long words, such as paths, is cut first, then what stands before the remedy, which
    is the part behind the last semicolon. Passwords of addresses are left out.
    """
    # A text of megabytes is not worth escaping as a whole.
    text = printable(without_secrets(cut(text.strip(), 16 * longest)))
    for most in (120, 80, 50):
        if len(text) <= longest:
            return text
        words = re.split(r"(\s+)", text)
        text = "".join(cut(word, most) for word in words)
    head, mark, remedy = text.rpartition("; ")
    if not mark or len(remedy) > longest * 2 // 3:
        return cut(text, longest)
    return f"{cut(head, longest - len(remedy) - len(mark))}{mark}{remedy}"


def cut(text: str, most: int) -> str:
    """Return a text of at most `most` characters, whose middle is left out if it was longer."""
    if len(text) <= most:
        return text
    tail = (most - 3) // 2
    return f"{text[: most - 3 - tail]}...{text[len(text) - tail :]}"


def reason(error: BaseException) -> str:
    """Say in a few words what went wrong: a parser's own first line, or the kind of error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, KeyError):
        return f"no {cut(printable(str(error)), _QUOTED)}"
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    # Before the middle is cut out: half a secret is not known for one.
    return cut(printable(without_secrets(cut(lines[0], 16 * _QUOTED))), _QUOTED)


@contextlib.contextmanager
def reading(what: object, remedy: str, is_: str = "") -> Iterator[None]:
    """Turn whatever goes wrong in the block into a UserError on `what`, with the `remedy`.

    `is_` says what it is then, such as "is damaged"; without, it cannot be read. A UserError passes
    as it is.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{what} is missing; {remedy}") from error
    # Parsers meet damage with whatever their code stumbles over.
    except Exception as error:
        told = f"{what} {is_}" if is_ else f"cannot read {what}"
        raise UserError(f"{told} ({reason(error)}); {remedy}") from error


def regular(path: Path, most: int = LARGE) -> os.stat_result:
    """Check that a path is a regular file of at most `most` bytes, without opening it.

    Raises UserError if it is not, and OSError as `Path.stat`.
    """
    return _checked(path, path.stat(), most)


@contextlib.contextmanager
def opened(path: Path, most: int = LARGE) -> Iterator[io.BufferedReader]:
    """Open a regular file of at most `most` bytes; nothing is waited for, as a pipe's writer is.

    Raises UserError for anything else, and OSError as `open`.
    """
    regular(path, most)
    # Another file may have taken its place meanwhile.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        _checked(path, os.fstat(stream.fileno()), most)
        yield stream


def _checked(path: Path, status: os.stat_result, most: int) -> os.stat_result:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise UserError(
            f"{path} is {_KINDS.get(kind, 'no regular file')}, not a file; remove it, or name a "
            "regular file"
        )
    if status.st_size > most:
        raise UserError(
            f"{path} has {status.st_size / 1e6:,.1f} MB, more than the {most / 1e6:,.1f} MB that "
            "such a file can have; replace it"
        )
    return status


def contents(path: Path, most: int = SMALL) -> bytes:
    """Read a file; errors as of `opened`."""
    data = bytearray()
    with opened(path, most) as stream:
        # In parts: Python reserves what it is asked for, and some files of the system are longer
        # than they tell.
        while part := stream.read(1 << 20):
            data += part
            if len(data) > most:
                raise UserError(f"{path} is longer than such a file can be; replace it")
    return bytes(data)


def text(path: Path, most: int = SMALL) -> str:
    """Read a file of UTF-8; UnicodeDecodeError if it is none, other errors as of `opened`."""
    # Newlines as `Path.read_text` has them.
    return contents(path, most).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def json_of(path: Path, most: int = SMALL) -> Any:  # noqa: ANN401 - any JSON value
    """Read a JSON file; ValueError or RecursionError if it is none, other errors as of `opened`."""
    return json.loads(text(path, most))


def without_secrets(text: str) -> str:
    """Return a text with `***` for passwords, tokens and keys, in a time linear in its length.

    Those are the user and password of a URI, values behind words such as `password=` and `token=`,
    and whatever a variable of the environment holds as one, also quoted, or in pieces: a library
    that takes a password apart at its `@` or `/` tells of the pieces.
    """
    for secret in sorted(_known(), key=len, reverse=True):
        if secret in text:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", HIDDEN, text)
    text = _TOKEN.sub(rf"\1\2{HIDDEN}", _HEADER.sub(rf"\1{HIDDEN}", text))
    # Before users: a password in the options of a URI may hold an @.
    text = _NAMED.sub(rf"\1{HIDDEN}", text)
    if "://" not in text or "@" not in text:
        return text
    return re.sub(r"\S+", _without_users, _BLANKS.sub(f"{HIDDEN}@", text))


def _without_users(found: re.Match[str]) -> str:
    """Hide users and passwords in a word: up to its last @, as passwords hold /, @ and : unquoted.

    That @ is looked for once, and not once an address.
    """
    word = found[0]
    last = word.rfind("@")
    if last < 0 or "://" not in word:
        return word
    parts, done = [], 0
    for user in _USER.finditer(word, 0, last + 1):
        parts += [word[done : user.start()], f"{HIDDEN}@"]
        done = last + 1 if user[1] else user.end()
        if user[1]:
            break
    return "".join([*parts, word[done:]])


def hide_secrets(stream: TextIO) -> None:
    r"""Let a stream write no secret, whoever writes to it: prints, logs, warnings, tracebacks.

    Control characters, which paths and names of files may have, become \x1b and the like.
    """
    write = stream.write
    if not hasattr(write, "hides_secrets"):

        def hidden(text: str, /) -> int:
            shown = text
            if not _LINES_UP.fullmatch(text):
                shown = _WITHIN.sub(lambda found: printable(found[0]), without_secrets(text))
            write(shown)
            return len(text)

        hidden.hides_secrets = True  # type: ignore[attr-defined]
        stream.write = hidden  # type: ignore[method-assign]


def _known() -> set[str]:
    """List what the environment holds: passwords, their quoted forms and their pieces."""
    found = set()
    for secret in _of_environment():
        for form in {secret, quote(secret, safe=""), quote(secret), unquote(secret)}:
            pieces = re.split(r"[/@:?#&=%\s]+", form)
            found |= {piece for piece in pieces if len(piece) >= _LEAST_PIECE}
            found |= {form} if len(form) >= _LEAST else set()
    return {one for one in found if one.lower().replace("-", "_") not in _HONEST}


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        # The shell's own PWD is a folder, and so may be where a secret lies.
        if _VARIABLE.search(name) and not os.path.isabs(value):
            yield value
            continue
        scheme, _, rest = value.partition("://")
        if "@" in rest and re.fullmatch(r"[A-Za-z][\w+.-]*", scheme):
            user, colon, password = rest[: rest.rindex("@")].partition(":")
            name = rest[: rest.index("@")]
            if colon and "/" not in user:
                yield password
            elif _is_token(scheme, name):
                yield name
        # Those among the options of an address.
        if "://" in value:
            yield from (found[2].strip("'\"") for found in _NAMED.finditer(value))


def _is_token(scheme: str, user: str) -> bool:
    """Tell a token from a name: addresses of the web alone have tokens for users."""
    if not scheme.lower().endswith(("http", "https")) or len(user) < _LEAST_USER or "/" in user:
        return False
    return len(user) >= 2 * _LEAST_USER or any(char.isdigit() for char in user)
