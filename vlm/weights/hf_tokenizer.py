"""A language model's tokenizer as ``transformers`` and its BLIP-2 processors have it, with a token for the image."""

from __future__ import annotations

import json
import re
from typing import Any

from vlm.data.llm_tokenizer import VOCABULARY
from vlm.data.tokenizers import Tokenizer
from vlm.errors import WeightsError

IMAGE = "<image>"
_OF_A_CHAT = re.compile(r"(?i)im_|start|end|turn|user|assistant|system|tool|header|eot|bos|eos|pad|unk|mask|sep|cls")


def take_image_token(tokenizer: Tokenizer, *, rows: int) -> int:
    """Id of the token that holds the image's place in a text; its embedding is never read.

    It is that of ``<image>`` where the vocabulary knows it, else of a row behind its words where there is a spare one,
    else of a special token that is neither the model's own nor a chat's, such as SmolLM2's <empty_output>; else of a
    new row. rows: of the token embedding. Raises WeightsError for a tokenizer that isn't a language model's.
    """
    engine = _engine(tokenizer)
    known = engine.get_vocab(with_added_tokens=True)
    if IMAGE in known:
        return int(known[IMAGE])
    free = 1 + max(known.values())
    if free < rows:
        return free
    own = {tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id}
    spare = [
        number
        for number, token in sorted(engine.get_added_tokens_decoder().items())
        if token.special and number not in own and number < rows and not _OF_A_CHAT.search(token.content)
    ]
    return spare[-1] if spare else free


def llm_fast(tokenizer: Tokenizer, *, seq2seq: bool, image_token: int) -> Any:
    """A fast tokenizer of transformers that begins, ends and pads texts as ours does before a visual prompt.

    seq2seq: whether what is given ends with the end token instead of beginning with the start token. image_token: id
    from `take_image_token`, which becomes that of ``<image>``: their processors know no other name. Raises
    WeightsError for a tokenizer that isn't a language model's.
    """
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    engine = _engine(tokenizer, image_token)
    engine.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    names = {"bos": tokenizer.start_id, "eos": tokenizer.end_id, "pad": tokenizer.pad_id}
    special = {f"{name}_token": engine.id_to_token(number) for name, number in names.items()}
    placed, text = ("eos_token", "$A {}") if seq2seq else ("bos_token", "{} $A")
    word = special[placed]
    engine.post_processor = TemplateProcessing(
        single=text.format(word), special_tokens=[(word, names[placed.removesuffix("_token")])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=engine, padding_side="right" if seq2seq else "left", **special)


def bert_fast(tokenizer: Tokenizer) -> Any:
    """A fast tokenizer of transformers for our WordPiece: InstructBLIP's Q-Former reads with one."""
    from tokenizers import Tokenizer as Engine
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    engine = Engine.from_str(tokenizer.engine.to_str())  # type: ignore[attr-defined]
    ids = {"[CLS]": tokenizer.start_id, "[SEP]": tokenizer.end_id}
    engine.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=list(ids.items()))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(
        tokenizer_object=engine, model_max_length=tokenizer.max_length, truncation_side="left", **special
    )


def _engine(tokenizer: Tokenizer, image_token: int | None = None) -> Any:
    """The engine of a language model's tokenizer; its token number `image_token`, if there is one, as `IMAGE`."""
    from tokenizers import Tokenizer as Engine

    files: dict[str, bytes] = getattr(tokenizer, "files", {})
    if VOCABULARY not in files:
        kind = str(tokenizer.to_dict()["kind"])
        raise WeightsError(f"its tokenizer is {kind!r}, not a language model's")
    settings = json.loads(files[VOCABULARY])
    for token in settings["added_tokens"]:
        if token["id"] == image_token:
            words = settings["model"]["vocab"]
            if isinstance(words, dict) and token["content"] in words:
                words[IMAGE] = words.pop(token["content"])
            token["content"] = IMAGE
    return Engine.from_str(json.dumps(settings))
