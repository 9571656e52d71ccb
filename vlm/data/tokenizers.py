"""Texts to token ids, offline: BERT's WordPiece (the lineage's own towers), CLIP's byte pairs, a language model's."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from vlm.data.batch import Tokens
from vlm.data.llm_tokenizer import VOCABULARY, llm_parts, read_llm_files
from vlm.errors import DataError, nearest, reason

# The loader tokenises in forked workers: threads started before the fork would be lost.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "wordpiece" / "vocab.txt"


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def pad_id(self) -> int:
        """Id of padding."""
        ...

    @property
    def start_id(self) -> int:
        """Id that every text begins with."""
        ...

    @property
    def end_id(self) -> int:
        """Id that every text ends with."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens that a text is cut at."""
        ...

    def __call__(self, texts: Sequence[str], *, max_length: int | None = None) -> Tokens:
        """Ids (B, L) padded to the longest text, cut at `max_length` with the end token kept."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON values, for `load_tokenizer`."""
        ...

    def save(self, folder: Path | str) -> None:
        """Write the vocabulary beside a model."""
        ...


@dataclass(frozen=True, eq=False)
class _Backed:
    """A `tokenizers` model with what our interface adds; built by `wordpiece`, `clip_bpe` and `llm_tokenizer`."""

    kind: str
    vocab_size: int
    pad_id: int
    start_id: int
    end_id: int
    max_length: int
    engine: Any = field(repr=False)
    mask_id: int | None = None
    clean: Callable[[str], str] | None = None
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    digest: str = ""

    def __call__(self, texts: Sequence[str], *, max_length: int | None = None) -> Tokens:
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, got one string: write [text]")
        limit = self.max_length if max_length is None else max_length
        if limit < 2:
            raise ValueError(f"max_length must be at least 2 (start and end token), got {limit}")
        rows = [text if self.clean is None else self.clean(text) for text in texts]
        encoded = self.engine.encode_batch(rows, add_special_tokens=False)
        ids = [[self.start_id, *row.ids[: limit - 2], self.end_id] for row in encoded]
        longest = max((len(row) for row in ids), default=0)
        out = np.full((len(ids), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(ids), longest), dtype=bool)
        for place, row in enumerate(ids):
            out[place, : len(row)] = row
            mask[place, : len(row)] = True
        return Tokens(torch.from_numpy(out), torch.from_numpy(mask))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; start, end, padding and mask tokens are left out."""
        special = {self.pad_id, self.start_id, self.end_id, self.mask_id}
        if self.kind == "clip":  # CLIP pads with 0, which is also the token "!"
            special = {self.start_id, self.end_id}
        return str(self.engine.decode([int(i) for i in ids if int(i) not in special])).strip()

    def continues(self) -> torch.Tensor:
        """(V,) boolean: true for ids that go on a word, so that a word is one of the others and those after it.

        Raises DataError for a vocabulary that doesn't mark them.
        """
        if self.kind != "wordpiece":
            raise DataError(f"a {self.kind} vocabulary doesn't mark where words begin; use wordpiece")
        found = torch.zeros(self.vocab_size, dtype=torch.bool)
        for word, place in self.engine.get_vocab(with_added_tokens=False).items():
            found[place] = word.startswith("##")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON values, for `load_tokenizer`."""
        return {
            "kind": self.kind,
            "max_length": self.max_length,
            "vocab_size": self.vocab_size,
            "vocab_sha256": self.digest,
        }

    def save(self, folder: Path | str) -> None:
        """Write the vocabulary (vocab.txt, or vocab.json and merges.txt) into `folder`."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (target / name).write_bytes(content)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild, (self.kind, self.files, self.max_length)


def wordpiece(vocab: Path | str | None = None, *, max_length: int = 64) -> Tokenizer:
    """BERT's uncased WordPiece: [CLS] text [SEP].

    vocab: a vocab.txt, one token a line, or a tokenizer.json of ``tokenizers``; default: bert-base-uncased's,
    which ships with the package. max_length: cut for calls that give none, [CLS] and [SEP] counted.
    Raises DataError when the file is missing, has no special tokens or is of another kind.
    """
    path = Path(vocab) if vocab is not None else ASSETS
    content = _read(path) if path.suffix != ".json" else _words_of_json(path)
    return _wordpiece(content, max_length, str(path))


def clip_bpe(merges: Path | str | None = None, *, max_length: int = 77) -> Tokenizer:
    """CLIP's byte-pair encoding: start, text, end; ids equal to open_clip's and to `CLIPTokenizer`'s.

    merges: a merges.txt as written by `save`; default: the vocabulary that open_clip carries. Texts are
    cleaned as open_clip does (broken encodings, HTML entities, spaces, case); the names of special tokens
    inside a text are ordinary text. Padding is 0, as in open_clip; the mask tells it from the token "!".
    Raises DataError when no vocabulary can be found.
    """
    if merges is not None:
        return _clip(_read(Path(merges)), max_length)
    try:
        from open_clip.tokenizer import default_bpe
    except ImportError as error:
        raise DataError("CLIP's vocabulary comes with open_clip: `pip install open_clip_torch`") from error
    lines = gzip.decompress(_read(Path(default_bpe()))).decode("utf-8").split("\n")
    # The file holds more merges than CLIP uses: 256 bytes, 256 word-final bytes, 2 special tokens.
    used = lines[1 : 49152 - 256 - 2 + 1]
    return _clip(("#version: 0.2\n" + "\n".join(used) + "\n").encode("utf-8"), max_length)


def llm_tokenizer(
    vocabulary: Path | str | None, *, max_length: int = 256, files: dict[str, bytes] | None = None
) -> Tokenizer:
    """A language model's own: start token, text, end token.

    vocabulary: a tokenizer.json of ``tokenizers`` with a special_ids.json beside it, as `save` writes them. files:
    their content instead. max_length: as for `wordpiece`. Raises DataError when one can't be read.
    """
    if files is None and vocabulary is None:
        raise DataError("a language model's tokenizer doesn't ship with the package: put its tokenizer.json there")
    found = llm_parts(read_llm_files(Path(str(vocabulary))) if files is None else files, where=str(vocabulary))
    return _Backed(kind="llm", max_length=max_length, **found)


def load_tokenizer(source: Path | str | dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its `to_dict`, or from a folder that `save` wrote into.

    A folder's config.json (key ``tokenizer``) gives the settings when it is there, and its vocabulary files
    are used before those of the package. Raises DataError when the vocabulary isn't the one described.
    """
    if isinstance(source, dict):
        return _from_settings(source, None)
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with vocab.txt or merges.txt")
    settings: dict[str, Any] = {}
    config = folder / "config.json"
    if config.is_file():
        try:
            settings = dict(json.loads(config.read_text("utf-8")).get("tokenizer") or {})
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{config}: not a model's config.json ({error})") from error
    if "kind" not in settings:
        if (folder / "vocab.txt").is_file():
            settings["kind"] = "wordpiece"
        elif (folder / "merges.txt").is_file():
            settings["kind"] = "clip"
        elif (folder / VOCABULARY).is_file():
            settings["kind"] = "llm"
        else:
            raise DataError(f"{folder}: no vocabulary, expected vocab.txt (WordPiece) or merges.txt (CLIP)")
    return _from_settings(settings, folder)


def _from_settings(settings: dict[str, Any], folder: Path | None) -> Tokenizer:
    kind = settings.get("kind")
    makers: dict[str, tuple[Callable[..., Tokenizer], str, int]] = {
        "wordpiece": (wordpiece, "vocab.txt", 64),
        "clip": (clip_bpe, "merges.txt", 77),
        "llm": (llm_tokenizer, VOCABULARY, 256),
    }
    if kind not in makers:
        raise DataError(f"tokenizer kind {kind!r} is unknown: wordpiece, clip or llm{nearest(str(kind), makers)}")
    make, name, default = makers[kind]
    own = folder / name if folder is not None and (folder / name).is_file() else None
    made = make(own, max_length=int(settings.get("max_length", default)))
    expected, found = settings.get("vocab_sha256"), made.to_dict()["vocab_sha256"]
    if expected and expected != found:
        raise DataError(
            f"the vocabulary {own or 'of the package'} is not the one that the model was trained with "
            f"(sha256 {found[:12]}, expected {expected[:12]}): put the model's own {name} beside config.json"
        )
    return made


def _wordpiece(content: bytes, max_length: int, name: str) -> Tokenizer:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    words = content.decode("utf-8").split("\n")
    if words and not words[-1]:
        words.pop()
    vocab = {word.rstrip("\r"): place for place, word in enumerate(words)}
    missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if word not in vocab]
    if missing:
        raise DataError(f"{name}: not a WordPiece vocabulary, it lacks {', '.join(missing)}")
    engine = Engine(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece(prefix="##")
    return _Backed(
        kind="wordpiece",
        engine=engine,
        vocab_size=len(vocab),
        pad_id=vocab["[PAD]"],
        start_id=vocab["[CLS]"],
        end_id=vocab["[SEP]"],
        mask_id=vocab["[MASK]"],
        max_length=max_length,
        files={"vocab.txt": content},
        digest=hashlib.sha256(content).hexdigest(),
    )


def _words_of_json(path: Path) -> bytes:
    """The vocab.txt of a tokenizer.json."""
    try:
        settings = json.loads(_read(path))
        kind, vocab = settings["model"]["type"], settings["model"]["vocab"]
        lowercase = (settings.get("normalizer") or {}).get("lowercase")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a tokenizer's file ({reason(error)})") from error
    words = sorted(vocab, key=vocab.__getitem__) if kind == "WordPiece" else []
    if not (words and lowercase) or [vocab[word] for word in words] != list(range(len(words))):
        raise DataError(f"{path}: expected an uncased WordPiece with ids from 0 on, found {kind}, {lowercase=}")
    return ("\n".join(words) + "\n").encode("utf-8")


def _clip(content: bytes, max_length: int) -> Tokenizer:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    lines = content.decode("utf-8").splitlines()[1:]
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines) if second]
    letters = _byte_letters()
    words = letters + [letter + "</w>" for letter in letters]
    words += [first + second for first, second in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: place for place, word in enumerate(words)}
    marks = {"unk_token": "<|endoftext|>", "continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    engine = Engine(models.BPE(vocab=vocab, merges=merges, **marks))
    pieces = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])
    return _Backed(
        kind="clip",
        engine=engine,
        vocab_size=len(vocab),
        pad_id=0,
        start_id=vocab["<|startoftext|>"],
        end_id=vocab["<|endoftext|>"],
        max_length=max_length,
        clean=_clip_clean,
        files={"merges.txt": content, "vocab.json": json.dumps(vocab, ensure_ascii=False).encode("utf-8")},
        digest=hashlib.sha256(content).hexdigest(),
    )


def _rebuild(kind: str, files: dict[str, bytes], max_length: int) -> Tokenizer:
    if kind == "clip":
        return _clip(files["merges.txt"], max_length)
    if kind == "llm":
        return llm_tokenizer("tokenizer.json", max_length=max_length, files=files)
    return _wordpiece(files["vocab.txt"], max_length, "vocab.txt")


def _clip_clean(text: str) -> str:
    if not (text.isascii() and text.isprintable() and "&" not in text):  # otherwise there is nothing to fix
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes, in the order of CLIP's and GPT-2's vocabularies."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + place) for place in range(len(hidden))]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the vocabulary can't be read ({error.strerror or error})") from error
