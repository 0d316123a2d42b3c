"""How command lines are read and explained."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """Names the flag that an unknown one may have been meant to be."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            given = [argument.partition("=")[0] for argument in unknown if argument.startswith("--")]
            meant = [difflib.get_close_matches(name, self._option_string_actions, n=1) for name in given]
            hints = [f"{name}: did you mean {match[0]}?" for name, match in zip(given, meant) if match]
            self.error("; ".join([f"unrecognized arguments: {' '.join(unknown)}", *hints]))
        return parsed


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS)) or action.default == ""
        return action.help if hidden or "default" in action.help else super()._get_help_string(action)
