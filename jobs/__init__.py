"""Running a job: it reads a table of prompts, has the engine answer them, and writes the table with the answers."""
