"""Finished rows: the parts that are committed while a job runs, and the output that is merged from them."""
