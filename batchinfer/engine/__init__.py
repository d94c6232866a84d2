"""Requests in, completions out, on one device: the loop of steps and all it decides by."""
