"""Words of a caption as the COCO evaluation counts them, without Java.

That evaluation splits by the rules of the Penn Treebank (Stanford's PTBTokenizer, ``-lowerCase``) and then drops
punctuation (arXiv 1504.00325 §3). What that does to captions is here as one table:

- all is lower case; ``n't``, ``'s``, ``'re`` and the like are words of their own, also ``can not`` and ``gon na``;
- hyphens, slashes and ``&`` inside a word keep it whole, so do points in numbers, abbreviations and file names;
- ``. , : ; ? ! - --``, ``...`` and quotes are dropped; brackets stay, as ``-lrb-`` and so on, for the evaluation only
  drops their upper-case names; every other sign stays as one word;
- emoji and control characters are dropped.

Rarer rules are left out, such as telephone numbers, smileys and the shares of dates.
"""

from __future__ import annotations

import re
import unicodedata

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
SIGNS = str.maketrans(
    {  # quotes and dashes by their numbers: they look alike
        **dict.fromkeys("\u2018\u2019\u201b\u2032", "'"), **dict.fromkeys("\u201c\u201d\u201e\xab\xbb\u2033", '"'),
        **dict.fromkeys("\u2013\u2014\u2015", " -- "), "…": " ... ", "\xad": "",
        "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "€": "$", "£": "#", "¢": " cents ",
    }
)  # fmt: skip
DROPPED = frozenset([*"'`.?!,:;-\"", "&quot;"])
_ABBREVIATED = (
    "mr|mrs|ms|dr|prof|st|rev|gen|col|sgt|capt|lt|jr|sr|inc|co|corp|ltd|bros|vs|etc|ph\\.d|ave|blvd|rd|mt|ft|dept|"
    "est|no|fig|vol|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs?|fri|sat|sun"
)
_LETTERS = r"[^\W\d_]"
_WORD = rf"(?:{_LETTERS}|\d|_)"
_SPLIT = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "gimme": "gim me", "lemme": "lem me",
    "wanna": "wan na", "'tis": "'t is", "'twas": "'t was", "more'n": "more 'n",
}  # fmt: skip
_TOKEN = re.compile(
    "|".join(
        [
            r"(?:https?://|ftp://|www\.)[^\s<>\"]*[\w/]",
            r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
            r"</?[a-z!][^\s<>]*>",
            r"&(?:#\d+|[a-z]+);",
            rf"(?<!\w)(?:{'|'.join(_SPLIT)})\b",
            r"(?<!\w)'n'(?!\w)",
            r"'(?:s|m|d|re|ve|ll|t|n|em)\b(?!')",
            r"n't\b",
            r"'\d\ds?\b",
            r"\b(?:[a-z]\.){2,}",
            rf"\b[a-z]\.(?=\s+{_LETTERS})",
            rf"\b(?:{_ABBREVIATED})\.",
            r"[-+]?(?:\d+(?:[.,]\d+)+|\d+/\d+|(?<!\w)\.\d+)(?!\w)",
            r"\d+(?::\d\d)+(?=[ap]m\b|\W|$)",
            r"(?<!\w)[-+]\d+\b(?![-/.])",
            r"[a-z]+(?=n't\b)",
            rf"(?:{_WORD}+(?:[-/&.'_]{_WORD}+)*?)(?='(?:s|m|d|re|ve|ll)\b)",
            rf"{_WORD}+(?:[-/&._']{_WORD}+)*(?:(?<=\b\w)(?:\+\+|#)(?!\w))?",
            r"@\w+",
            r"\.{2,}|-{2,}|\*+|_+",
            r"\S",
        ]
    )
)


def caption_words(text: str) -> list[str]:
    """The words of a caption, none for a text of punctuation alone."""
    plain = unicodedata.normalize("NFC", text).lower().translate(SIGNS)
    words: list[str] = []
    for token in _TOKEN.findall(plain):
        if token in DROPPED or not token.strip(".-") or _unknown(token):
            continue
        words += _SPLIT[token].split() if token in _SPLIT else [BRACKETS.get(token, token)]
    return words


def _unknown(token: str) -> bool:
    """Whether it is a sign that PTBTokenizer has no word for: emoji, controls, unassigned."""
    return (
        len(token) == 1
        and token not in "°^©®™"
        and unicodedata.category(token) in ("So", "Sk", "Cf", "Cn", "Co", "Cs", "Cc", "Mn", "Me")
    )
