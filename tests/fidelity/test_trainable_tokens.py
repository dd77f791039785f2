"""trainable_tokens."""

LAWS = {"trainable_tokens": [dict(token_indices=(3, 1, 12))]}
