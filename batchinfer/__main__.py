"""`python -m batchinfer`: the command line, by the interpreter that runs it."""

from batchinfer.jobs.cli.main import main

if __name__ == "__main__":
    main()
