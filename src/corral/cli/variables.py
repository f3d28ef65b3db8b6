"""What the environment variables mean, in the few words that a line of a command's help has room for.

docs/reference.md has them all, in sentences; settings.py reads them. Imported by help alone.
"""

from typing import Final

#: At most 44 characters each, so that a line of help fits 80 columns.
MEANINGS: Final = {
    "OLLAMA_HOST": "Where the server is (127.0.0.1:11434)",
    "OLLAMA_MODELS": "Installed models (~/.ollama/models)",
    "OLLAMA_KEEP_ALIVE": "How long a model stays loaded (5m)",
    "OLLAMA_LOAD_TIMEOUT": "How long a load may stall (5m)",
    "OLLAMA_CONTEXT_LENGTH": "Context length where nothing says one",
    "OLLAMA_NUM_PARALLEL": "Requests a model answers at once",
    "OLLAMA_MAX_LOADED_MODELS": "Models loaded at once",
    "OLLAMA_MAX_QUEUE": "Requests that may wait (512)",
    "OLLAMA_ORIGINS": "Further web origins that may call",
    "OLLAMA_NO_CLOUD": "Refuse everything that would go to a hub",
    "OLLAMA_NOHISTORY": "Keep no history of prompts",
    "OLLAMA_NOPRUNE": "Keep blobs that no model needs",
    "OLLAMA_EDITOR": "Editor for a prompt (VISUAL, EDITOR)",
    "OLLAMA_DEBUG": "Log more: 1 or 2",
    "OLLAMA_API_KEY": "Used where this device is not connected",
    "CORRAL_HUB": "The hub to use",
    "CORRAL_HOME": "The hub's data (~/.corral)",
    "CORRAL_HUB_LISTEN": "Where the hub listens (127.0.0.1:11435)",
    "CORRAL_PUBLIC_URL": "How others reach the hub, by https",
    "CORRAL_DATABASE_URL": "The hub's database",
    "CORRAL_SIGNUP": "open: anyone may make an account",
    "CORRAL_QUOTA": "What each account may hold, as 50GB",
    "CORRAL_MAX_REPOSITORIES": "How many repositories an account may have",
    "CORRAL_SCRUB_DAYS": "How often all blobs are read again (30)",
    "CORRAL_MIRROR": "What to fetch from other registries",
    "CORRAL_TRUSTED_PROXIES": "Proxies whose headers are believed",
    "CORRAL_LLAMA_SERVER": "A llama-server to use as the engine",
    "CORRAL_LOCAL_AUTH": "Whom serve asks for a key: off, remote, on",
    "CORRAL_AUTHORIZED_KEYS": "The keys that count (~/.ollama/…)",
    "CORRAL_ALLOW_PUBLIC": "Let others than this machine call",
}
