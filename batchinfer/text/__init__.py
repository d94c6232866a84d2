"""Tokenizers (text to token ids and back), and chat templates, which run in a sandbox."""
