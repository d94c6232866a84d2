"""Rows before the engine: prompts to token ids, windows, duplicates, the order to run in."""
