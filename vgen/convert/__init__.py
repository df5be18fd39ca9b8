"""Original state dicts to our generators: one table of key patterns a family."""
