"""Networks only: tensors in, tensors out; no file, no tokenizer, no rank.

One letter for each dimension, the same in every file of this room:
B batch, L text length, N image tokens (patches + 1), Q queries, H heads, D width, V vocabulary,
S keys looked at (a text's, an image's or a cache's length).
"""
