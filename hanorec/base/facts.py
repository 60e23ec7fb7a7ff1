"""Facts that a file states about itself, held against those that a command expects."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from hanorec.base.errors import InputError


def check_facts(
    stored: Any,
    expected: Mapping[str, Any],
    complaint: Callable[[str, Any, Any], str],
) -> None:
    """InputError with `complaint(name, found, wanted)` for the first fact that is another one.

    expected: name -> value, compared as JSON states it (a tuple is a list there). stored: what the
    file holds; anything but an object states nothing, and a fact that it lacks counts as None.
    """
    stored = stored if isinstance(stored, dict) else {}
    for name, wanted in json.loads(json.dumps(expected)).items():
        if stored.get(name) != wanted:
            raise InputError(complaint(name, stored.get(name), wanted))
