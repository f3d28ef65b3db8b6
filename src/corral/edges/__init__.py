"""HTTP and HTML coming in. May import: wire, core, serving, hub, local. Never storage, engines or clients."""
