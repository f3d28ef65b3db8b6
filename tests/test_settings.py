"""What the environment may say, and what is refused."""

from pathlib import Path

import pytest

from corral.settings import BadSetting, Settings, parse_hub_url, parse_ollama_host, parse_seconds


def settings(**environ: str) -> Settings:
    return Settings.from_env({"HOME": "/home/finch", **environ})


def test_settings_of_an_empty_environment_are_the_documented_defaults() -> None:
    found = settings()
    assert found.local.url == "http://127.0.0.1:11434"
    assert found.models_dir == Path("/home/finch/.ollama/models")
    assert found.corral_home == Path("/home/finch/.corral")
    assert found.hub_listen.bind == "127.0.0.1:11435"
    assert found.public_url == "http://localhost:11435"
    assert (found.keep_alive_s, found.max_queue, found.hub, found.api_key) == (300.0, 512, "", None)
    assert not found.is_signup_open
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":1234", "http://127.0.0.1:1234"),
        ("example.com:1234", "http://example.com:1234"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("http://1.2.3.4:4321", "http://1.2.3.4:4321"),
        ("example.com/", "http://example.com:11434"),
        ("https://example.com:4321/ollama/", "https://example.com:4321/ollama"),
        ("ollama.com", "https://ollama.com:443"),
        ("[::1]", "http://[::1]:11434"),
        ("[::1]:1337", "http://[::1]:1337"),
        ("::1", "http://[::1]:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("[::]:9", "http://[::1]:9"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(text: str, url: str) -> None:
    assert parse_ollama_host(text).url == url


@pytest.mark.parametrize("text", ["1.2.3.4:66000", "1.2.3.4:-1", "1.2.3.4:http", "1.2.3.4:"])
def test_ollama_host_with_a_bad_port_falls_back_with_a_warning(text: str) -> None:
    found = settings(OLLAMA_HOST=text)
    assert found.local.port == 11434
    assert "port" in found.warnings[0]


@pytest.mark.parametrize("text", ["ftp://x", "ho st", "http://a@b", "x\ny", "no:such:host", "https://a..b", "a" * 64])
def test_ollama_host_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadSetting, match="OLLAMA_HOST"):
        settings(OLLAMA_HOST=text)


@pytest.mark.parametrize("host", [f"{'a' * 63}.test", "localhost.", "[::1]"])
def test_ollama_host_of_the_longest_name_or_with_a_dot_behind_is_one(host: str) -> None:
    assert settings(OLLAMA_HOST=f"http://{host}:1").local.url == f"http://{host}:1"


@pytest.mark.parametrize("key", ["crlk_canary\r\nx: y", "crlk_canary\ncrlk_b", "crlk_canary\u2713"])
def test_api_key_that_no_header_carries_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(BadSetting, match="OLLAMA_API_KEY has a line break") as refused:
        settings(OLLAMA_API_KEY=key)
    assert "canary" not in refused.value.message


def test_values_lose_spaces_and_quotes() -> None:
    assert settings(OLLAMA_HOST=' "1.2.3.4" ').local.host == "1.2.3.4"
    assert settings(OLLAMA_MODELS="'/data/models'").models_dir == Path("/data/models")


def test_paths_know_the_home_directory() -> None:
    assert settings(CORRAL_HOME="~/hub").corral_home == Path("/home/finch/hub")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300),
        ("90", 90),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("300ms", 0.3),
        ("-1", -1),
        ("-5m", -300),
        ("0", 0),
        (".5s", 0.5),
        ("10x", None),
        ("", None),
        ("m", None),
        ("1h 2m", None),
        ("9999999h", None),
        ("٣s", None),
    ],
)
def test_durations_are_go_durations_or_seconds(text: str, seconds: float | None) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OLLAMA_KEEP_ALIVE", "soon"),
        ("OLLAMA_NUM_PARALLEL", "-2"),
        ("OLLAMA_MAX_QUEUE", "many"),
        ("OLLAMA_CONTEXT_LENGTH", "4k"),
        ("CORRAL_SIGNUP", "maybe"),
        ("CORRAL_HUB", "ftp://hub.example.org"),
        ("CORRAL_HUB", "https://hub.example.org/path"),
        ("CORRAL_HUB", "https://hub.example.org:99999"),
        ("CORRAL_HUB_LISTEN", "127.0.0.1:0"),
        ("CORRAL_HUB_LISTEN", "http://127.0.0.1:80"),
        ("CORRAL_PUBLIC_URL", "http://hub.example.org"),
        ("CORRAL_DATABASE_URL", "mysql://x"),
        ("CORRAL_TRUSTED_PROXIES", "10.0.0.0/8,nonsense"),
        ("CORRAL_TRUSTED_PROXIES", "10.0.0.1/8"),
        ("CORRAL_MIRROR", "library"),
        ("CORRAL_MIRROR", "library/*=https://a.example,*=https://b.example"),
        ("CORRAL_MIRROR", "library/*=http://registry.example.org"),
    ],
)
def test_bad_value_is_refused_in_one_sentence_that_names_the_variable(variable: str, value: str) -> None:
    with pytest.raises(BadSetting) as refused:
        settings(**{variable: value})
    assert variable in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("library/*=https://a.example, friends=https://b.example", "rule 2 (friends=…): a rule is"),
        ("library/*=https://a.example, hf.co/*=http://b.example", "in rule 2 (hf.co/*=…); only https"),
        ("https://me:hunter2@r.example/?x=y", "rule 1: a rule is"),
        ("library", "rule 1: a rule is"),
    ],
)
def test_bad_mirror_rule_is_named(value: str, shown: str) -> None:
    with pytest.raises(BadSetting) as refused:
        settings(CORRAL_MIRROR=value)
    assert shown in refused.value.message
    assert "hunter2" not in refused.value.message


def test_bad_value_that_may_hold_a_password_is_not_repeated() -> None:
    for variable, value in (
        ("CORRAL_HUB", "https://me:hunter2@hub"),
        ("CORRAL_DATABASE_URL", "mysql://me:hunter2@db"),
        ("CORRAL_MIRROR", "library/*=https://me:hunter2@r.example"),
    ):
        with pytest.raises(BadSetting) as refused:
            settings(**{variable: value})
        assert "hunter2" not in refused.value.message


@pytest.mark.parametrize(
    ("text", "is_off"), [("1", True), ("true", True), ("on", True), ("0", False), ("false", False), ("", False)]
)
def test_truth_is_read_as_ollama_reads_it(text: str, is_off: bool) -> None:
    assert settings(OLLAMA_NO_CLOUD=text).is_cloud_off is is_off


def test_t087_hub_off_loopback_needs_a_public_https_url() -> None:
    with pytest.raises(BadSetting, match="CORRAL_PUBLIC_URL"):
        settings(CORRAL_HUB_LISTEN="0.0.0.0:11435")
    with pytest.raises(BadSetting, match="https"):
        settings(CORRAL_HUB_LISTEN="0.0.0.0:11435", CORRAL_PUBLIC_URL="http://hub.example.org")
    found = settings(CORRAL_HUB_LISTEN="0.0.0.0:11435", CORRAL_PUBLIC_URL="https://hub.example.org/")
    assert found.public_url == "https://hub.example.org"


@pytest.mark.parametrize("listen", ["", "127.0.0.1:9", "localhost:9", "[::1]:9"])
@pytest.mark.parametrize("proxies", ["", "10.0.0.0/8", "127.0.0.2,::2", "2001:db8::/32"])
def test_t017_public_hub_behind_a_proxy_on_this_machine_must_know_it(listen: str, proxies: str) -> None:
    environ = {"CORRAL_PUBLIC_URL": "https://hub.example.org", "CORRAL_HUB_LISTEN": listen, "CORRAL_TRUSTED_PROXIES": proxies}
    with pytest.raises(BadSetting, match="set CORRAL_TRUSTED_PROXIES=") as refused:
        settings(**environ)
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("listen", "proxies"),
    [
        ("", "127.0.0.1"),
        ("", "10.0.0.0/8,127.0.0.0/8"),
        ("127.0.0.7:9", "127.0.0.1"),
        ("[::1]:9", "::1"),
        ("localhost:9", "127.0.0.1,::1"),
    ],
)
def test_t017_public_hub_that_knows_its_proxy_starts(listen: str, proxies: str) -> None:
    url = "https://hub.example.org"
    assert settings(CORRAL_PUBLIC_URL=url, CORRAL_HUB_LISTEN=listen, CORRAL_TRUSTED_PROXIES=proxies).public_url == url


def test_t017_proxy_is_named_by_the_address_it_comes_from() -> None:
    for listen, missing in (("", "127.0.0.1"), ("[::1]:9", "::1"), ("localhost:9", "127.0.0.1,::1")):
        with pytest.raises(BadSetting, match=f"CORRAL_TRUSTED_PROXIES={missing} "):
            settings(CORRAL_PUBLIC_URL="https://hub.example.org", CORRAL_HUB_LISTEN=listen)


def test_hub_for_this_machine_alone_needs_no_proxy() -> None:
    for url in ("", "http://localhost:11435", "http://127.0.0.1:11435", "https://localhost:8443"):
        assert settings(CORRAL_PUBLIC_URL=url).trusted_proxies == ()


def test_public_url_of_a_loopback_hub_follows_its_port() -> None:
    assert settings(CORRAL_HUB_LISTEN="127.0.0.1:9999").public_url == "http://localhost:9999"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("hub.example.org", "https://hub.example.org"),
        ("https://Hub.Example.org/", "https://hub.example.org"),
        ("localhost:11435", "http://localhost:11435"),
        ("127.0.0.1:9", "http://127.0.0.1:9"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_hub_may_be_named_by_its_host_alone(text: str, url: str) -> None:
    assert parse_hub_url(text, where="--hub") == url


def test_api_key_is_not_shown_by_the_settings() -> None:
    assert "crlk_canary" not in repr(settings(OLLAMA_API_KEY="crlk_canary"))


def test_lists_are_split_at_commas() -> None:
    found = settings(OLLAMA_ORIGINS="https://a.example, app://x ,", CORRAL_TRUSTED_PROXIES="10.0.0.0/8, 127.0.0.1")
    assert found.origins == ("https://a.example", "app://x")
    assert [str(network) for network in found.trusted_proxies] == ["10.0.0.0/8", "127.0.0.1/32"]


@pytest.mark.parametrize(("text", "level"), [("", 0), ("0", 0), ("1", 1), ("true", 1), ("2", 2), ("7", 2), ("false", 0)])
def test_debug_has_three_levels(text: str, level: int) -> None:
    assert settings(OLLAMA_DEBUG=text).debug == level


def test_mirror_rules_are_read_in_order() -> None:
    found = settings(CORRAL_MIRROR="library/*=https://registry.ollama.ai, docker.io/*=http://127.0.0.1:5000/")
    assert [(rule.namespace, rule.base_url, rule.prefix) for rule in found.mirrors] == [
        ("library", "https://registry.ollama.ai", None),
        ("docker.io", "http://127.0.0.1:5000", ""),
    ]


def test_mirror_is_off_by_default() -> None:
    assert settings().mirrors == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("0", 0),
        ("123", 123),
        ("500MB", 500_000_000),
        ("1.5 tb", 1_500_000_000_000),
        ("20G", 20_000_000_000),
        ("1kB", 1000),
    ],
)
def test_quota_is_a_size(text: str, expected: int) -> None:
    assert settings(CORRAL_QUOTA=text).quota_bytes == expected


@pytest.mark.parametrize("text", ["-1", "lots", "1e9", "5 PB", "1,5GB", "9" * 20, ".5GB"])
def test_quota_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadSetting, match="CORRAL_QUOTA"):
        settings(CORRAL_QUOTA=text)


@pytest.mark.parametrize(("text", "prefers"), [("", None), ("1", True), ("0", False), ("false", False), ("yes", True)])
def test_go_templates_are_chosen_only_when_somebody_says(text: str, prefers: bool | None) -> None:
    assert settings(OLLAMA_GO_TEMPLATE=text).prefers_go_template is prefers
