"""The flags of a command: how they are shown, and what is said of one that does not exist."""

import argparse
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

FLAG = re.compile(r"(--[A-Za-z][\w-]*)(=\S*)?")  # alone, or with its value


class _Help(argparse.RawDescriptionHelpFormatter):
    """Lines of the docstring stay as they are; a flag says its default, or that it is required."""

    def _get_help_string(self, action: argparse.Action) -> str:
        about, default = action.help or "", action.default
        if action.required and action.option_strings:
            return f"required; {about}" if about else "required"
        if default in (None, argparse.SUPPRESS, "") or default == [] or action.nargs == 0:
            return about
        if re.search(r"\bdefault\b", about):  # which it says itself
            return about
        values = default if isinstance(default, list) else [default]
        shown = " ".join(str(x).lower() if isinstance(x, bool) else str(x) for x in values)
        return f"{about} (default: {shown.replace('%', '%%')})".lstrip()


class Parser(argparse.ArgumentParser):
    """argparse as all commands here have it.

    A flag is written with hyphens and may be given with underscores; none is abbreviated, and for
    one that does not exist the nearest is named.
    """

    def __init__(self, about: str | None, **options: Any) -> None:
        super().__init__(
            description=about, formatter_class=_Help, allow_abbrev=False, **options
        )

    def parse_args(
        self, words: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        words = hyphened(sys.argv[1:] if words is None else words)
        unknown = [] if {"-h", "--help"} & set(words) else self._unknown(words)
        if unknown:
            known = [name.removeprefix("--") for name in self._option_string_actions]
            near = []
            for flag in filter(FLAG.fullmatch, unknown):
                near += get_close_matches(flag[2:].partition("=")[0], known, n=1)
            meant = f"is {' '.join(f'--{name}' for name in near)} meant? " if near else ""
            said = f"unknown arguments: {' '.join(unknown)}"
            self.error(f"{said}; {meant}--help lists the known ones")
        return super().parse_args(words, namespace)

    def parse_known_args(
        self, words: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = hyphened(sys.argv[1:] if words is None else words)
        return super().parse_known_args(words, namespace)

    def _unknown(self, words: Sequence[str]) -> list[str]:
        """The flags that do not exist, each with what follows up to the next flag."""
        found, lost = [], False
        for word in words:
            if flag := FLAG.fullmatch(word):
                lost = flag[1] not in self._option_string_actions
            if lost:
                found.append(word)
        return found


def hyphened(words: Sequence[str]) -> list[str]:
    """The words of a command with --a_b and --a_b=c as --a-b and --a-b=c."""
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        found.append(name.replace("_", "-") + equals + value if FLAG.fullmatch(name) else word)
    return found
