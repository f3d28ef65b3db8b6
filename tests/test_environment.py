"""Ollama's environment variables: each is a setting, or docs/environment.md says what becomes of it."""

import re
from pathlib import Path

import pytest

from corral.engines.launch import CACHE_TYPES
from corral.serving.capacity import KV_BYTES
from corral.settings import BadSetting, Settings
from tooling import tool_module

PAGE = Path(__file__).resolve().parent.parent / "docs/environment.md"
#: As `ollama serve --help` and the reference list them, in the order of the reference.
VARIABLES = [
    "OLLAMA_HOST",
    "OLLAMA_MODELS",
    "OLLAMA_KEEP_ALIVE",
    "OLLAMA_LOAD_TIMEOUT",
    "OLLAMA_CONTEXT_LENGTH",
    "OLLAMA_NUM_PARALLEL",
    "OLLAMA_MAX_LOADED_MODELS",
    "OLLAMA_MAX_QUEUE",
    "OLLAMA_MAX_TRANSFER_STREAMS",
    "OLLAMA_ORIGINS",
    "OLLAMA_REMOTES",
    "OLLAMA_NO_CLOUD",
    "OLLAMA_CLOUD_BASE_URL",
    "OLLAMA_AUTH",
    "OLLAMA_DEBUG",
    "OLLAMA_DEBUG_LOG_REQUESTS",
    "OLLAMA_FLASH_ATTENTION",
    "OLLAMA_KV_CACHE_TYPE",
    "OLLAMA_GPU_OVERHEAD",
    "OLLAMA_SCHED_SPREAD",
    "OLLAMA_LLM_LIBRARY",
    "OLLAMA_VULKAN",
    "OLLAMA_IGPU_ENABLE",
    "LLAMA_ARG_FIT",
    "LLAMA_ARG_FIT_TARGET",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "GGML_VK_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "HSA_OVERRIDE_GFX_VERSION",
    "OLLAMA_GO_TEMPLATE",
    "OLLAMA_NOPRUNE",
    "OLLAMA_NOHISTORY",
    "OLLAMA_EDITOR",
    "OLLAMA_AGENT_DISABLE_SHELL",
    "OLLAMA_AGENT_DISABLE_WEBSEARCH",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
]


def settings(**environ: str) -> Settings:
    return Settings.from_env({"HOME": "/home/finch", **environ})


def told_on_the_page() -> set[str]:
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}


@pytest.mark.parametrize("variable", VARIABLES)
def test_variable_of_ollama_is_a_setting_or_the_page_says_what_becomes_of_it(variable: str) -> None:
    is_setting = variable in tool_module("make_reference").variables()
    assert is_setting != (variable in told_on_the_page())


def test_nothing_here_is_read_that_the_page_calls_meaningless() -> None:
    assert not told_on_the_page() & tool_module("make_reference").variables()


# ── Cloud ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_remotes_are_names_without_spaces_in_lower_case() -> None:
    assert settings(OLLAMA_REMOTES=" Box , ollama.com,").remotes == ("box", "ollama.com")
    assert settings().remotes == ()


@pytest.mark.parametrize(
    ("text", "hub"),
    [
        ("https://hub.example", "https://hub.example"),
        ("https://hub.example/", "https://hub.example"),
        ('"http://127.0.0.1:8080"', "http://127.0.0.1:8080"),
        ("http://localhost:1", "http://localhost:1"),
    ],
)
def test_cloud_base_url_names_the_hub_unless_our_own_variable_does(text: str, hub: str) -> None:
    assert settings(OLLAMA_CLOUD_BASE_URL=text).hub == hub
    assert settings(OLLAMA_CLOUD_BASE_URL=text, CORRAL_HUB="https://ours.example").hub == "https://ours.example"


@pytest.mark.parametrize(
    "text",
    [
        "hub.example",
        "http://hub.example",
        "https://hub.example/path",
        "https://hub.example?x=1",
        "https://hub.example#x",
        "https://ada:secret@hub.example",
        "ftp://hub.example",
        "https://",
        "http://[::1",
    ],
)
def test_cloud_base_url_that_ollama_would_not_take_is_ignored_with_a_warning(text: str) -> None:
    found = settings(OLLAMA_CLOUD_BASE_URL=text)
    assert found.hub == ""
    assert "OLLAMA_CLOUD_BASE_URL" in found.warnings[0]
    assert "secret" not in found.warnings[0]


# ── Switches and words ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("text", "is_on"), [("", False), ("0", False), ("False", False), ("1", True), ("T", True), ("on", True)])
def test_switches_are_read_as_go_reads_booleans(text: str, is_on: bool) -> None:
    found = settings(OLLAMA_AUTH=text, OLLAMA_DEBUG_LOG_REQUESTS=text)
    assert (found.is_signing, found.logs_requests) == (is_on, is_on)


@pytest.mark.parametrize(("text", "choice"), [("", None), ("0", False), ("true", True), ("auto", True)])
def test_flash_attention_is_left_to_the_engine_unless_somebody_says(text: str, choice: bool | None) -> None:
    assert settings(OLLAMA_FLASH_ATTENTION=text).flash_attention is choice


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_every_cache_type_of_the_engine_is_a_setting_that_plans_know(cache_type: str) -> None:
    assert settings(OLLAMA_KV_CACHE_TYPE=cache_type).kv_cache_type in KV_BYTES


def test_engine_words_are_checked_before_they_reach_the_engine() -> None:
    assert settings(OLLAMA_KV_CACHE_TYPE="Q8_0", OLLAMA_GPU_OVERHEAD="536870912").kv_cache_type == "q8_0"
    for variable, value in (("OLLAMA_KV_CACHE_TYPE", "--log-file=/x"), ("OLLAMA_GPU_OVERHEAD", "-1")):
        with pytest.raises(BadSetting, match=variable):
            settings(**{variable: value})


@pytest.mark.parametrize(
    ("environ", "editor"),
    [
        ({}, ""),
        ({"EDITOR": "ed"}, "ed"),
        ({"EDITOR": "ed", "VISUAL": "vi"}, "vi"),
        ({"EDITOR": "ed", "VISUAL": "vi", "OLLAMA_EDITOR": "code --wait"}, "code --wait"),
    ],
)
def test_editor_is_the_first_that_is_named(environ: dict[str, str], editor: str) -> None:
    assert settings(**environ).editor == editor


# ── Proxies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_proxies_are_read_by_either_spelling() -> None:
    found = settings(https_proxy="proxy:3128", HTTP_PROXY="http://other", no_proxy="a.example, .b.example").proxies
    assert found.proxy_of("https://hub.example") == "http://proxy:3128"
    assert found.proxy_of("http://hub.example") == "http://other"
    assert found.proxy_of("https://a.example") is None


@pytest.mark.parametrize("text", ["socks5://ada:hunter2@proxy", "http://", "http://[::1"])
def test_proxy_that_is_none_is_refused_without_its_password(text: str) -> None:
    with pytest.raises(BadSetting, match="HTTPS_PROXY") as refused:
        settings(HTTPS_PROXY=text)
    assert "hunter2" not in refused.value.message


# ── Web search and fetch ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", ""),
        ("http://127.0.0.1:8888", "http://127.0.0.1:8888/search"),
        ("https://search.example/", "https://search.example/search"),
        ("https://example.org/searx/search", "https://example.org/searx/search"),
    ],
)
def test_search_url_gets_the_path_of_searxng(text: str, url: str) -> None:
    assert settings(CORRAL_SEARCH_URL=text).search_url == url


@pytest.mark.parametrize("text", ["search.example", "ftp://x", "http://ada:hunter2@", "http://x/?q=1"])
def test_search_url_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadSetting, match="CORRAL_SEARCH_URL") as refused:
        settings(CORRAL_SEARCH_URL=text)
    assert "hunter2" not in refused.value.message


def test_pages_are_fetched_only_when_somebody_says_so() -> None:
    assert not settings().is_web_fetch_on
    found = settings(CORRAL_WEB_FETCH="on", CORRAL_WEB_FETCH_NETWORKS="10.1.0.0/16")
    assert found.is_web_fetch_on
    assert [str(network) for network in found.web_fetch_networks] == ["10.1.0.0/16"]
    with pytest.raises(BadSetting, match="CORRAL_WEB_FETCH_NETWORKS"):
        settings(CORRAL_WEB_FETCH_NETWORKS="10.1.0.0/99")
