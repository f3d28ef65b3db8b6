"""The composition root: the only package that names concrete adapters and hands them to services and edges.

Each half is put together by a function of its own, whose imports stand inside it: a local server never loads the database, a hub
never loads the cloud relay, and an administration command loads neither HTTP server. That keeps starts short and memory small
(docs/performance.md, P14).
"""
