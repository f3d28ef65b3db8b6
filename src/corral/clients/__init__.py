"""ADAPTERS for outbound HTTP. May import: wire, core."""
