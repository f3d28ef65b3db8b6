"""T113: secrets that a run handles are in no log, no error, no listing and no file but the one that must hold them."""

from pathlib import Path

from flows.stack import MODEL, PASSWORD, Stack, call

CLOUD = f"{MODEL}-cloud"
PROMPT = "canary-prompt-4f1d the owl and the cat"


def test_t113_canary_secrets_are_absent_from_logs_and_files(stocked: Stack) -> None:
    stocked.env["OLLAMA_DEBUG"] = "2"
    up = stocked.start()
    setup_code = up.wait_for(r"/signup\?code=(\S+)")[1]
    shown = up.output
    stocked.add_account()
    key = stocked.sign_in()
    device_secret = (stocked.home / ".ollama/id_ed25519").read_text().splitlines()[2]
    stocked.generate(CLOUD, PROMPT)
    stocked.generate(MODEL, PROMPT, at=stocked.hub_url, key=key)
    # Error paths see the same secrets: a wrong one, one in the wrong place, one beside another.
    damaged = key[:-1] + ("A" if key[-1] != "A" else "B")
    stocked.generate(MODEL, PROMPT, at=stocked.hub_url, key=damaged)
    stocked.generate("no-such-model", PROMPT, at=stocked.hub_url, key=key)
    call("GET", f"{stocked.hub_url}/api/me?key={key}&password=canary-password-81c2")
    call("POST", f"{stocked.hub_url}/api/me", headers={"Authorization": f"Bearer {key}", "x-api-key": key})
    call("POST", f"{stocked.hub_url}/api/generate", b'{"model": ' + PROMPT.encode(), key=key)
    cookie = {"Cookie": "corral-11435=canary-cookie-77aa"}
    call("POST", f"{stocked.local_url}/api/generate", b'{"prompt": "' + PROMPT.encode(), headers=cookie)
    listing = call("GET", f"{stocked.hub_url}/api/keys", key=key).body.decode()
    stocked.stop()

    logged = up.output[len(shown) :]
    for name, secret in {
        "API key": key,
        "API key's secret part": key[15:47],
        "damaged API key": damaged[5:],
        "password": PASSWORD,
        "device key": device_secret,
        "prompt": "canary-prompt-4f1d",
        "password in a query": "canary-password-81c2",
        "cookie": "canary-cookie-77aa",
        "setup code": setup_code,
    }.items():
        assert secret not in logged, f"the {name} was logged"
        assert secret not in listing, f"the {name} is listed"
        holders = [path for path in stocked.home.rglob("*") if path.is_file() and secret.encode() in small(path)]
        allowed = ["id_ed25519"] if name == "device key" else []
        assert [path.name for path in holders] == allowed, f"the {name} is in a file"
    assert "Traceback" not in logged


def small(path: Path) -> bytes:
    """The file's content; model weights aside."""
    return path.read_bytes() if path.stat().st_size < 20_000_000 else b""
