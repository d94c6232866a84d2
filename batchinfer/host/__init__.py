"""What the machine gives: files and their checksums, limits of a process, the device, the allocator."""
