"""Names under another prefix: of a model inside a wrapper, or taken out of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

__all__ = ["Prefixes", "prefixes_between"]


class Prefixes(NamedTuple):
    """How names of a model change with its wrapper.

    Example:
        >>> Prefixes("model.", "net.")("model.layer4.0"), Prefixes("", "model.")("")
        ('net.layer4.0', 'model')
    """

    removed: str
    added: str

    def __call__(self, name: str) -> str | None:
        """The name under the other prefix, the model itself being the empty name; None for a name without the removed one."""
        if not f"{name}.".startswith(self.removed):
            return None
        return f"{self.added}{f'{name}.'.removeprefix(self.removed)}".removesuffix(".") if name else self.added[:-1]


def prefixes_between(names: Collection[str], known: Collection[str]) -> list[Prefixes]:
    """The changes of prefix that make every one of some names a known one; of these the ones that remove least."""
    first = next(iter(names))
    parts = first.split(".") if first else []
    for count in range(len(parts) + 1):
        removed, rest = "".join(f"{part}." for part in parts[:count]), ".".join(parts[count:])
        if rest or not parts:
            ends = [name[: len(name) - len(rest)] for name in known if f".{name}".endswith(f".{rest}")]
            ends = ends if rest else [f"{name}." for name in known if name]
        else:
            ends = [""] if "" in known else []
        distinct = dict.fromkeys(Prefixes(removed, added) for added in ends)
        found = [one for one in distinct if all(one(name) in known for name in names)]
        if found:
            return found
    return []
