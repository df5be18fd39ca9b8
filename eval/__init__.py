"""Evaluation. Runs from a clone as `python -m eval.<name>`; in code `from eval.x import y`, never `import eval`."""
