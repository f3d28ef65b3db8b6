"""PURE. Bytes, JSON and text in, values out. Time and randomness are arguments; nothing here does I/O."""
