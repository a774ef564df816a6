"""Markup that escapes by itself: whatever is not `Html` already is text, wherever it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

_NO_MARK = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\ud800-\udfff]")
_VOID = ("meta", "img", "input", "br")


class Html(str):
    """Text that is markup already. Any other string is escaped when `tag` meets it."""

    __slots__ = ()


def text(child: str) -> Html:
    """The child as markup: itself where it is `Html`, else escaped."""
    return child if isinstance(child, Html) else Html(_safe(child))


def _safe(said: str) -> str:
    """Escaped, and without marks that no document can hold."""
    return escape(_NO_MARK.sub("\ufffd", said))


def joined(children: Iterable[str], between: str = "\n") -> Html:
    """The children one after the other; empty ones are left out."""
    return Html(text(between).join(text(child) for child in children if child))


def tag(element: str, /, *children: str, **attributes: str | bool | None) -> Html:
    """An element. `class_` is class and `data_x` is data-x; True is a bare attribute, None and False are none."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_safe(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    opened = f"<{element}{given}>"
    return Html(opened if element in _VOID else f"{opened}{joined(children, '')}</{element}>")
