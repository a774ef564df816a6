"""`fewstep families`: what each family of diffusers models is, as its file in fewstep/models/families says it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from fewstep.core.errors import UserError
from fewstep.models import families
from fewstep.models.codec import Codec
from fewstep.models.family import Family, linearly

MEANINGS = {
    "family": "the file in fewstep/models/families, which `fewstep families NAME` shows in full",
    "pipelines": "of diffusers: what a teacher is opened as, and what a student is exported as",
    "reads": "labels, or prompts of so many tokens at most (as many as its encoders take where there is no number)",
    "makes": "images or videos",
    "guidance": "how an unconditional and a conditional output are put together: in a line, or kept to a norm",
    "told": "the guidance that some networks are told beside the prompt (`model.embedded_guidance`)",
    "times": "even: the pipeline hands its scheduler the times 1, .., 1/n; otherwise the scheduler has its own",
    "lines": "of code, without blank ones, that the family takes",
}


@dataclass(frozen=True)
class Known:
    """A family: its file and what is in it."""

    name: str
    module: ModuleType

    @property
    def rows(self) -> dict[str, Family]:
        return self.module.ROWS

    @property
    def codecs(self) -> dict[str, type[Codec]]:
        return getattr(self.module, "CODECS", {})

    @property
    def title(self) -> str:
        return (self.module.__doc__ or "").strip().splitlines()[0].split(":")[0].rstrip(".")

    @property
    def lines(self) -> int:
        return sum(bool(line.strip()) for line in inspect.getsource(self.module).splitlines())

    def row(self) -> dict[str, str]:
        """Column -> what it says of this family."""
        return {
            "family": self.name,
            "pipelines": ", ".join(self.codecs) or "on pixels alone",
            "reads": self._reads(),
            "makes": self._each(lambda codec: "videos" if codec.VIDEOS else "images") or "images",
            "guidance": "a line" if all(row.guide is linearly for row in self.rows.values()) else "by norm",
            "told": self._each(lambda codec: f"{codec.embedded_guidance:g}" if codec.embedded_guidance else ""),
            "times": self._each(lambda codec: "even" if codec.EVEN_SIGMAS else ""),
            "lines": str(self.lines),
        }

    def _reads(self) -> str:
        if not any(codec.PROMPTED for codec in self.codecs.values()):
            return "labels"
        tokens = self._each(lambda codec: str(codec.max_sequence_length or ""))
        return f"prompts, {tokens}" if tokens else "prompts"

    def _each(self, say: Callable[[type[Codec]], str]) -> str:
        """What the codecs have to say, each thing once."""
        said = dict.fromkeys(say(codec) for codec in self.codecs.values())
        return " or ".join(word for word in said if word)


def known() -> list[Known]:
    """Every family, in the order of the table."""
    modules = (*families.LABELLED, *families.PROMPTED)
    return [Known(module.__name__.rpartition(".")[2], module) for module in modules]


def describe(name: str | None = None) -> str:
    """The table of families, or all about one of them. Raises UserError for a name that is none."""
    if name is None:
        rows = [one.row() for one in known()]
        return "\n".join([*_aligned(rows), "", *(f"{column}: {said}" for column, said in MEANINGS.items())])
    by_name = {one.name: one for one in known()}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"there is no family '{name}': {hint}use one of {', '.join(by_name)}")
    return _in_full(by_name[name])


def _aligned(rows: list[dict[str, str]]) -> list[str]:
    """A header and the rows, in columns."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def _in_full(one: Known) -> str:
    from fewstep.models import tiny  # transformers, which the table can do without

    lines = [f"{one.title}, {one.lines} lines", ""]
    lines += [f"{column}: {said}" for column, said in one.row().items() if column not in ("family", "lines") and said]
    for name, row in one.rows.items():
        lines += [
            f"network {name}",
            f"  repeated blocks, which are compiled: {', '.join(row.blocks)}",
            f"  time embedding, to which dials are added: {row.time_embedding}",
            f"  attention that model.attention reaches: {', '.join(row.processors)}",
        ]
    makers = getattr(getattr(tiny, one.name, None), "MAKERS", {})
    stands = {hub: maker for hub, maker in tiny.STANDS_FOR.items() if maker in makers}
    lines += [f"--tiny stands in for {hub}" for hub in stands]
    return "\n".join(lines)
