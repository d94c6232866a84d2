"""The engine's process, and what watches it from the job's own."""
