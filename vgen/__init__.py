"""Generators of visual tokens, step by step."""
