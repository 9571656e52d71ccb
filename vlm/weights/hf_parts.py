"""What a folder of ``transformers`` holds beside its weights: activations, filters, tokenizer, preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.data.tokenizers import Tokenizer, wordpiece
from vlm.errors import WeightsError
from vlm.weights.files import read_json

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
FILTERS = {2: "bilinear", 3: "bicubic"}
ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def activation_name(ours: str) -> str:
    """transformers' name of one of our activations."""
    return {value: key for key, value in reversed(ACTS.items())}[ours]


def square(value: Any, name: str, where: str) -> int:
    """A side of a setting that is a number or two equal ones. Raises WeightsError where they differ."""
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or sides[0] != sides[1]:
        raise WeightsError(f"{where}: {name} {value}: expected a square")
    return int(sides[0])


def read_tokenizer(folder: Path, *, max_length: int, vocab_size: int) -> Tokenizer:
    """The WordPiece tokenizer of a folder, or of bert-base-uncased where it has none.

    Raises WeightsError where it keeps upper case, or has more tokens than the network knows.
    """
    found = [path for path in (folder / "vocab.txt", folder / "tokenizer.json") if path.is_file()]
    path = folder / "tokenizer_config.json"
    if path.is_file() and not read_json(path).get("do_lower_case", True):
        raise WeightsError(f"{path}: do_lower_case is false, expected an uncased vocabulary")
    tokenizer = wordpiece(found[0] if found else None, max_length=max_length)
    if tokenizer.vocab_size > vocab_size:
        raise WeightsError(f"{folder}: the network knows {vocab_size} tokens, its tokenizer {tokenizer.vocab_size}")
    return tokenizer


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """The settings of a folder's image processor; empty where there are none."""
    if (folder / PREPROCESSOR).is_file():
        return read_json(folder / PREPROCESSOR)
    if (folder / PROCESSOR).is_file():
        return read_json(folder / PROCESSOR).get("image_processor") or {}
    return {}


def bert_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer_config.json says of an uncased WordPiece vocabulary."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": tokenizer.max_length, **special,
    }  # fmt: skip
