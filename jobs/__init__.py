"""The job: tables in, tables out; planned, committed as it runs, resumed, reported."""
