"""Reading input tables: one file a format, all yielding the same batches of records."""
