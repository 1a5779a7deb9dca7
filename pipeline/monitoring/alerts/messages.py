"""The message templates of alert rules; their fields are figures by name: ``{entropy/mean:.3g}``."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from typing import Any


class _Messages(string.Formatter):
    """Fields are whole names, dots and slashes included; nothing that a field lacks is an error."""

    def get_field(self, field_name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        return kwargs.get(field_name, "unknown"), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return "not finite"
        try:
            return format(value, format_spec)
        except (ValueError, TypeError):
            return str(value)


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """``template`` with its fields; "unknown" for those missing, "not finite" for numbers that are not."""
    return _Messages().vformat(template, (), fields)
