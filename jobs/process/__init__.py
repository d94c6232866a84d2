"""The engine's process, and the code in the job's own process that watches it."""
