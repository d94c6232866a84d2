"""batchinfer: offline batch inference over a table of prompts, on one device."""

__version__ = "0.1.0"
