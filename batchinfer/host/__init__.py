"""The machine that a job runs on: files and their checksums, limits of a process, memory, device and allocator."""
