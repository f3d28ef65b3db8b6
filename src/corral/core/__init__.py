"""VOCABULARY shared by both halves: records, ports and policy. No I/O. May import: wire."""
