"""The figures of docs/performance.md: every one a ratio of two sides measured in turn, in one run, on one machine."""
