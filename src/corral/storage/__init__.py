"""ADAPTERS to disks and databases. May import: wire, core."""
