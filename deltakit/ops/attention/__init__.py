"""Attention with a prefix: which modules attend, and how trained keys and values enter their attention."""
