"""A language model's own tokenizer behind our interface: start token, text, end token."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vlm.errors import DataError, reason

VOCABULARY, SPECIAL = "tokenizer.json", "special_ids.json"
IDS = ("start", "end", "pad")


def special_ids(*, start: int, end: int, pad: int) -> bytes:
    """What stands in special_ids.json: the ids that a text begins, ends and is padded with."""
    return json.dumps({"start": start, "end": end, "pad": pad}).encode()


def llm_parts(files: dict[str, bytes], *, where: str) -> dict[str, Any]:
    """The parts of a tokenizer from its tokenizer.json and special_ids.json, for `vlm.data.tokenizers.llm_tokenizer`.

    Raises DataError, naming `where`, when one of them can't be read.
    """
    from tokenizers import Tokenizer as Engine

    try:
        engine = Engine.from_str(files[VOCABULARY].decode("utf-8"))
        special = {name: int(json.loads(files[SPECIAL])[name]) for name in IDS}
    except Exception as error:  # tokenizers raises bare exceptions
        raise DataError(f"{where}: not a language model's tokenizer ({reason(error)})") from error
    engine.no_truncation()
    engine.no_padding()
    size = engine.get_vocab_size(with_added_tokens=True)
    outside = [f"{name} {value}" for name, value in special.items() if not value >= 0]
    if outside:
        raise DataError(f"{where}: {', '.join(outside)} in {SPECIAL} are no ids")
    digest = hashlib.sha256(files[VOCABULARY] + files[SPECIAL]).hexdigest()
    ids = {f"{name}_id": value for name, value in special.items()}
    return {
        "engine": engine,
        "vocab_size": max(size, 1 + max(special.values())),
        "files": files,
        "digest": digest,
    } | ids


def read_llm_files(vocabulary: Path) -> dict[str, bytes]:
    """tokenizer.json and the special_ids.json beside it. Raises DataError when one can't be read."""
    try:
        return {name: vocabulary.with_name(name).read_bytes() for name in (VOCABULARY, SPECIAL)}
    except OSError as error:
        raise DataError(f"{error.filename}: the vocabulary can't be read ({error.strerror or error})") from error
