"""The HTTP service: zero-shot classification and features of pictures and texts."""
