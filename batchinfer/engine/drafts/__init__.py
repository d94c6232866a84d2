"""Speculation: whose draft tokens to verify in a step, how many, and whether at all."""
