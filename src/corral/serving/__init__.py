"""SERVICES both halves share: describing a model and running it. May import: wire, core."""
