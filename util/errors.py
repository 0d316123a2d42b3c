"""Errors that are meant for people."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
    """Something that the user can correct.

    Its message says what was given, what is allowed and what to do, and is all that is shown. Every other exception is
    a bug in the program and keeps its traceback.
    """


class RunError(RuntimeError):
    """Something that ends a run although the program may be correct; its message, too, is for people."""


@contextlib.contextmanager
def unreadable_is_user_error(what: str) -> Iterator[None]:
    """Around reading or writing something that the user named: OSErrors become UserErrors that begin with `what`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}") from error


def require_writable(path: str, flag: str, ending: str = ".json") -> None:
    """Raise a UserError if results cannot be written to the file that `flag` names, or would replace one that is not an
    older result, since its name has another `ending`. Call it before the work that would be lost; the file's content
    stays."""
    if os.path.isfile(path) and os.path.getsize(path) and not path.lower().endswith(ending):
        raise UserError(
            f"{flag} {path} exists and is not replaced, since a result would be a {ending} file: give another name"
        )
    with unreadable_is_user_error(f"{flag} {path} cannot be written"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()
