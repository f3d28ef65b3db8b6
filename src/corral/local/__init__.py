"""SERVICES of the local side. May import: wire, core, serving. Never hub, never an adapter."""
