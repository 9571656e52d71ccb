"""Data: pictures, captions, shards, tokenizers, batches."""
