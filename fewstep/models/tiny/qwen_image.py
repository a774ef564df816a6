"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAKERS: dict[str, Callable[..., Any]] = {}
STANDS_FOR: dict[str, str] = {}
