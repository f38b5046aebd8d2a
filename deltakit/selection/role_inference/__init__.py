"""Roles (`@attn.q`, `@ff.down`) inferred from the structure of a backbone, without a table of architectures."""
