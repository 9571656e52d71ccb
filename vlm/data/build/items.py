"""One picture on its way into the set."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.data.build.packages import Package


@dataclass
class Item:
    """A picture's file with what is known about it before it is drawn and given a split."""

    key: str
    path: Path
    kind: str
    """``human``, ``openmoji`` or ``web``."""
    cluster: str
    """Pictures of one cluster stand in one split."""
    package: Package
    meta: dict[str, Any] = field(default_factory=dict)

    def described(self, split: str) -> dict[str, Any]:
        """The sample's JSON."""
        origin = {"source": self.package.label, "licence": self.package.licence, "split": split}
        return {"attribution": self.package.attribution} | self.meta | origin
