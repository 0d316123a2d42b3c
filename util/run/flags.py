"""How flags are declared, parsed and checked.

A flag is a field of a configuration class: its annotation is its type, and `flag` gives its default, its help, its
check, and what a change of it means for a run that is resumed. `get_parser` makes the command line of such a class, and
`given_flags` an object of it, which cannot be written to.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from util.errors import UserError

C = TypeVar("C", bound="Config")

# --- Declaring flags ---


# What is no longer identical when a flag changes in a run that is resumed.
RECIPE = None  # all of it, as this is another experiment: refused
FREE = ""  # nothing: where things are, how fast they go, what is reported and kept
BATCHES = "steps are made of other images, or averaged in another order"
ROUNDING = "the same computation, but it rounds differently"

Check = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and the rule in words
POSITIVE: Check = (lambda value: value > 0, "must be positive")
AT_LEAST_1: Check = (lambda value: value >= 1, "must be at least 1")
AT_LEAST_2: Check = (lambda value: value >= 2, "must be at least 2")
NOT_NEGATIVE: Check = (lambda value: value >= 0, "must not be negative")
PROBABILITY: Check = (lambda value: 0 <= value <= 1, "must be between 0 and 1")
FRACTION: Check = (lambda value: 0 < value < 1, "must be above 0 and below 1")
SHARE: Check = (lambda value: 0 < value <= 1, "must be above 0 and at most 1")
BELOW_1: Check = (lambda value: 0 <= value < 1, "must be at least 0 and below 1")


def flag(
    default: Any,
    help: str,
    metavar: str | None = None,
    check: Check | None = None,
    on_resume: str | None = RECIPE,
    choices: Sequence[str] | None = None,
    aliases: Sequence[str] = (),
    required: str = "",
    default_before: bool = False,
) -> Any:
    """A field of a configuration class that is a flag.

    Args:
        default: its value if it is not given; None means that `resolve` or the data decide.
        help: what `--help` says.
        metavar: what `--help` calls the value.
        check: what values are allowed (None, if it is the default, always is).
        on_resume: what is no longer identical when it changes in a run that is resumed: `RECIPE`, `FREE` or words.
        choices: the allowed words.
        aliases: other spellings, with their dashes.
        required: what to give, for the message if the flag is missing (its value is empty).
        default_before: whether runs that do not record it, older ones and the authors', are taken to have the default.
    """
    metadata = dict(help=help, metavar=metavar, check=check, on_resume=on_resume, choices=choices, aliases=aliases)
    return dataclasses.field(
        default=default, metadata=metadata | dict(required=required, default_before=default_before)
    )


free = partial(flag, on_resume=FREE)


def with_default(flags: type["Config"], name: str, default: Any) -> Any:
    """The field of a flag that `flags` declares, with another default for one main."""
    return dataclasses.field(default=default, metadata=flags.__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class Config:
    """What all configurations can do. Writing to one is a `dataclasses.FrozenInstanceError`.

    Raises:
        UserError: on construction, for a value that is not allowed; says which flag, what was given, what is allowed.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, check = getattr(self, field.name), field.metadata["check"]
            if check is not None and value is not None and not check[0](value):
                raise UserError(f"--{field.name} {check[1]}, got {value}")
            if field.metadata["required"] and not value:
                raise UserError(f"--{field.name} is missing: give {field.metadata['required']}")

    def as_dict(self) -> dict[str, Any]:
        """All values by name, plain ones, as checkpoints store them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


# --- The command line ---

NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan|inf|infinity)", re.IGNORECASE)


def number(text: str) -> float:
    """The type of flags that are numbers: a finite one, since checks miss NaN, for which all comparisons are false.

    Raises:
        ValueError, argparse.ArgumentTypeError: for another.
    """
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def with_home(argument: str) -> str:
    """An argument whose `~` is the home folder: shells expand it in `~/runs`, but few in `--output_dir=~/runs`."""
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return name + equals + os.path.expanduser(value)


class Parser(argparse.ArgumentParser):
    """Suggests what an unknown flag may have been meant to be, ends a list of numbers where the numbers end, and
    expands `~` to the home folder in all arguments."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        # Lists of numbers come last, where they cannot take the images that follow them for more numbers.
        args = [with_home(argument) for argument in (sys.argv[1:] if args is None else args)]
        end = args.index("--") if "--" in args else len(args)
        several = [
            name
            for name, action in self._option_string_actions.items()
            if action.nargs == argparse.ONE_OR_MORE and action.type in (int, number)
        ]
        others, lists, in_list = [], [], False
        for before, argument in zip(["", *args], args[:end]):
            first = before in several and not argument.startswith("--")  # if it is not a number, argparse says so
            in_list = argument in several or first or (in_list and NUMBER.fullmatch(argument))
            (lists if in_list else others).append(argument)
        parsed, unknown = self.parse_known_args([*others, *lists, *args[end:]], namespace)
        if unknown:
            given = [argument.partition("=")[0] for argument in unknown if argument.startswith("--")]
            known = list(self._option_string_actions)
            meant = [
                [flag for flag in known if flag.startswith(f"{name}_")] or difflib.get_close_matches(name, known, n=1)
                for name in given
            ]
            hints = [f"{name}: did you mean {match[0]}?" for name, match in zip(given, meant) if match]
            self.error("; ".join([f"unrecognized arguments: {' '.join(unknown)}", *hints]))
        return parsed


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default is False or action.default in (None, "", (), [], argparse.SUPPRESS)
        return action.help if hidden or "default" in action.help else super()._get_help_string(action)


def get_parser(config_class: type[Config], description: str, prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of a configuration class: one argument group for each class of flags that it is made of."""
    parser = Parser(allow_abbrev=False, prog=prog, description=description, formatter_class=HelpFormatter)
    kinds = typing.get_type_hints(config_class)
    for flags in config_class.__mro__:
        if "TITLE" in vars(flags):
            group = parser.add_argument_group(flags.TITLE, vars(flags).get("DESCRIPTION"))
            own = set(flags.__dataclass_fields__).difference(*(base.__dataclass_fields__ for base in flags.__bases__))
            for field in dataclasses.fields(config_class):  # with the defaults of this class
                if field.name in own:
                    _add_flag(group, field, kinds[field.name])
    return parser


def _add_flag(group: Any, field: dataclasses.Field, kind: Any) -> None:
    name, metadata, default = f"--{field.name}", field.metadata, field.default
    optional = isinstance(kind, types.UnionType)  # X | None
    kind = typing.get_args(kind)[0] if optional else kind
    if kind is bool:
        action = "store_true" if default is False else argparse.BooleanOptionalAction
        group.add_argument(name, action=action, default=default, help=metadata["help"])
        if default is not False:
            options = dict(action="store_false", dest=field.name, default=argparse.SUPPRESS)
            group.add_argument(f"--no_{field.name}", help=f"the same as --no-{field.name}", **options)
        return
    options = {key: metadata[key] for key in ("help", "metavar", "choices") if metadata[key] is not None}
    if metadata["required"]:
        options["help"] += " (required)"
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        options["nargs"], kind = "+" if items[-1] is Ellipsis else len(items), items[0]
    kind = number if kind is float else kind
    group.add_argument(name, *metadata["aliases"], type=kind, default=default, **options)


def given_flags(config_class: type[C], flags: argparse.Namespace) -> C:
    """The parsed flags, checked one by one and against each other, before anything is read or written.

    Raises:
        UserError: naming the flag, what was given and what is allowed.
    """
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(config_class)}
    return config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
