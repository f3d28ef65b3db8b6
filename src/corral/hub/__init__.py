"""SERVICES of the hosted side. May import: wire, core, serving. Never local, never an adapter."""
