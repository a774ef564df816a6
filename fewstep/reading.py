"""Files from anywhere, read within bounds: whatever lies in them, what comes out is plain data or one sentence.

Only ordinary files are opened, never a pipe or a device, and none beyond the size that its kind can have.
"""

from __future__ import annotations

import json
import math
import stat
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MIB = 2**20
DESCRIPTION = 16 * MIB
"""the most bytes of what describes something: configs, manifests, indices, tables"""
LINES = 1024 * MIB
"""the most bytes of what goes on line by line: prompts, captions, logs"""
PICTURE = 256 * MIB
CAPTION = MIB
ARCHIVE = 4096 * MIB
"""the most bytes that a packed file of arrays may have when it is unpacked"""

_DEEPEST = 50
MOST_PIXELS = 64_000_000
_FREE_PIXELS, _PACKED = 2**22, 10_000
"""pixels that any picture may have; beyond them, how many one byte of its file can stand for"""

# Keys that say how often something is built or how long a table is, in the configs of networks and schedulers.
_BUILT, _LISTED = ("layers", "blocks", "depth"), ("num_train_timesteps", "inference_steps")
_MOST_BUILT, _MOST_LISTED, _LARGEST = 1_000, 100_000, 2**31


def plain(path: Path, most: int) -> int:
    """The bytes of an ordinary file. Raises UserError for anything else, and for more than `most`."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(found.st_mode):
        raise _unreadable(path, "it is no ordinary file")
    if found.st_size > most:
        raise _unreadable(path, f"it has {found.st_size:,} bytes, and {most:,} is the most that such a file has")
    return found.st_size


def content(path: Path, most: int = DESCRIPTION) -> bytes:
    """The bytes of a file. Raises UserError, naming it."""
    size = plain(path, most)
    try:
        with path.open("rb") as file:
            return file.read(size + 1)
    except OSError as error:
        raise _unreadable(path, error) from None


def text(path: Path, most: int = DESCRIPTION) -> str:
    """The text of a UTF-8 file, with or without its mark. Raises UserError, naming it."""
    try:
        return content(path, most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _unreadable(path, "it is no UTF-8 text") from None


def parsed(said: str | bytes, finite: bool = True) -> Any:
    """What JSON says. Raises ValueError for what is none, and with `finite` for NaN and infinity."""
    try:
        if not finite:
            return json.loads(said)
        return json.loads(said, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"it holds {digits[:20]}, which no number can hold")
    return value


def fields(path: Path, most: int = DESCRIPTION, finite: bool = True) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, naming it."""
    try:
        value = parsed(text(path, most), finite)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise _unreadable(path, error) from None
    if not isinstance(value, dict):
        raise _unreadable(path, "it holds no keys and values")
    return value


def described(path: Path) -> dict[str, Any]:
    """The config of a network or a scheduler, before anything is built of it. Raises UserError, naming the file."""
    found = fields(path, finite=False)
    if wrong := _beyond(found, ""):
        raise _unreadable(path, wrong)
    return found


# What schedulers of diffusers write where they clip nothing.
_UNCLIPPED = ("lambda_min_clipped", -math.inf)


def _beyond(node: Any, key: str) -> str | None:
    """Which number no network has, or None: negative where it counts, or so large that building would not end."""
    if isinstance(node, dict):
        return next((wrong for name, part in node.items() if (wrong := _beyond(part, str(name)))), None)
    if isinstance(node, list):
        if len(node) > _MOST_LISTED:
            return f"{key} is a list of {len(node):,}"
        return next((wrong for part in node if (wrong := _beyond(part, key))), None)
    if isinstance(node, float) and not math.isfinite(node):
        return None if (key, node) == _UNCLIPPED else f"{key} is {node}, which is no number"
    if isinstance(node, bool) or not isinstance(node, int):
        return None
    least, most = -_LARGEST, _LARGEST
    for names, many in ((_BUILT, _MOST_BUILT), (_LISTED, _MOST_LISTED)):
        if any(name in key for name in names):
            least, most = 0, many
    return None if least <= node <= most else f"{key} is {node if abs(node) < 10**40 else 'beyond all bounds'}"


def settings(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file of settings. Raises UserError, naming it."""
    said = text(path)
    try:
        return settings_in(said)
    except UserError as error:
        raise _unreadable(path, error) from None


def settings_in(said: str) -> dict[str, Any]:
    """The keys and values of YAML: plain data without tags, and without anything that is put in place of ${..}.

    Aliases may be used; what would grow beyond thousands of nodes by them is refused. Raises UserError.
    """
    from omegaconf import OmegaConf  # half of a second that JSON needs not wait

    try:
        _refuse_yaml(said)
        found = OmegaConf.to_container(OmegaConf.create(said))
    except Exception as error:  # the reader of YAML raises errors of many kinds
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"it is not a YAML file that can be read: {shown(reason, 300)}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError("it must hold keys and values at its top level")
    return {str(key): value for key, value in found.items()}


def _refuse_yaml(said: str) -> None:
    """Raises ValueError for text that the reader of YAML must not see: it crashes at nodes that lie very deep."""
    import yaml

    depth = 0
    for event in yaml.parse(said, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"its nodes lie more than {_DEEPEST} deep")
        if tag := getattr(event, "tag", None):
            raise ValueError(f"it holds the tag {tag}, and only plain values are read")
        if "${" in getattr(event, "value", ""):
            raise ValueError("it holds ${..}, and values are written out here")


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped. Raises UserError, naming it."""
    opened = safetensors(path)
    try:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
    except Exception as error:  # lying headers end in errors of several libraries
        raise _unreadable(path, error) from None


def safetensors(path: Path) -> Any:
    """A safetensors file, open: only its header has been read. Raises UserError, naming it."""
    from safetensors import safe_open  # reports and logs are read without torch

    plain(path, 2**62)
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise _unreadable(path, error) from None


def unpacks(path: Path, most: int = ARCHIVE) -> None:
    """Raises UserError for what is no zip file, or one that unpacks to more than `most` bytes."""
    plain(path, ARCHIVE)
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(member.file_size for member in packed.infolist())
    except Exception as error:  # damaged ones end in errors of many kinds
        raise _unreadable(path, error) from None
    if size > most:
        raise _unreadable(path, f"it unpacks to {size:,} bytes")


def sized(size: tuple[int, int], packed: int) -> None:
    """Raises OSError for a picture of that size that `packed` bytes cannot hold, or that is too large for memory."""
    pixels = size[0] * size[1]
    if pixels > MOST_PIXELS or pixels > max(_FREE_PIXELS, _PACKED * packed):
        raise OSError(f"{size[0]} x {size[1]} pixels in {packed:,} bytes")


def is_name(name: object) -> bool:
    """Whether this is the name of a file in a folder, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")


def there(path: Path) -> bool:
    """Whether something lies at `path`; nothing does under a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def shown(said: str, most: int = 2000) -> str:
    """`said` for a line of a terminal: nothing in it moves the cursor or breaks the line, and it ends somewhere."""
    said = said if len(said) <= most else f"{said[:most]}.."
    return "".join(mark if mark.isprintable() else " " if mark.isspace() else "\ufffd" for mark in said)


def literal(said: str, most: int = 200) -> str:
    """`said` as a string of Python's on one line, which ends where it ends whatever is in it."""
    return json.dumps(shown(said, most), ensure_ascii=False)


def _unreadable(path: Path, why: object) -> UserError:
    if isinstance(why, OSError) and why.strerror:
        why = why.strerror
    reason = next((line.strip() for line in str(why).splitlines() if line.strip()), type(why).__name__)
    return UserError(f"{shown(str(path), 300)} cannot be read: {shown(reason, 300)}")
