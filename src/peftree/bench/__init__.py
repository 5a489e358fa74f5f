"""The benchmark: run records, statistics, and later suites and runs."""
