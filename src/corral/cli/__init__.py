"""The TERMINAL. May import: wire, core, clients; and `settings` and `main` for what runs or administers a server."""
