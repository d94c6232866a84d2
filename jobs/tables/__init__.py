"""Reading input tables: one file for each format; all formats yield record batches."""
