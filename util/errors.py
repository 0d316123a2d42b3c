"""The classes of the errors that are meant for people."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
    """Something that whoever started the program can put right.

    Its message says what was given, what is allowed and what to do, and is all that is shown. Every other exception is
    a fault of the program and keeps its traceback.
    """


class RunError(RuntimeError):
    """Something that ends a run although the program may be right; its message, too, is for people."""


@contextlib.contextmanager
def unreadable_is_user_error(what: str) -> Iterator[None]:
    """Around reading or writing something that the user named: OSErrors become UserErrors that begin with `what`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}") from error


def require_writable(path: str, flag: str) -> None:
    """Raise a UserError where results cannot be written to the file that `flag` names; what is in it stays. To be
    called before the work that would be lost."""
    with unreadable_is_user_error(f"{flag} {path} cannot be written"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()
