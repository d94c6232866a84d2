"""Finished rows: parts that are committed, and the output that is made of them."""
