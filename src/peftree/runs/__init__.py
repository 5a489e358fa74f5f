"""What a run found: the one record of it, its address, and reading it back from files."""
