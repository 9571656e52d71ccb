"""Vision-language models, trained stage by stage: CLIP first; ViLT, ALBEF, BLIP and BLIP-2 to follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Asker", "Captioner", "Chat", "VlmError", "ZeroShotClassifier", "__version__", "load"]

if TYPE_CHECKING:
    from vlm.errors import VlmError
    from vlm.tasks.ask import Asker, Chat
    from vlm.tasks.caption import Captioner
    from vlm.tasks.zero_shot import ZeroShotClassifier
    from vlm.weights.load import load

# Found when first asked for, so that `import vlm` stays fast.
_PLACES = {
    "Asker": "vlm.tasks.ask",
    "Chat": "vlm.tasks.ask",
    "Captioner": "vlm.tasks.caption",
    "VlmError": "vlm.errors",
    "ZeroShotClassifier": "vlm.tasks.zero_shot",
    "load": "vlm.weights.load",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'vlm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
