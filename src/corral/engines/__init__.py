"""ADAPTERS that run weights. May import: wire, core."""
