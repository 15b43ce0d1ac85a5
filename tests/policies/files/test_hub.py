"""A hub id where the hub cannot be reached: said at once, by name, and a copy in the cache is used."""

import http.server
import threading
import time

import pytest
from huggingface_hub import constants
from transformers import LlamaConfig

from grpo.source.policy_source import check_model
from policies import layout
from policies.files import hub
from policies.policy import AutoConfig, AutoTokenizer, PolicyError, read_config, read_tokenizer


@pytest.fixture
def online(monkeypatch, tmp_path):
    """`online(url)`: the hub is expected at `url`, and its cache is empty; no library may ask it."""
    hub.unreachable.cache_clear()

    def expect(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "*")
        for library in (AutoConfig, AutoTokenizer):
            monkeypatch.setattr(library, "from_pretrained", lambda *_, **__: pytest.fail("would retry for a minute"))

    yield expect
    hub.unreachable.cache_clear()


NOBODY = "http://127.0.0.1:9"  # refuses at once


@pytest.mark.parametrize("read", [read_config, read_tokenizer, check_model])
def test_a_hub_id_without_a_hub_is_refused_at_once_and_says_so(online, read):
    online(NOBODY)
    with pytest.raises(PolicyError) as error:
        read("owner/name")
    said = f"is neither a preset, a checkpoint folder nor a reachable hub id: {NOBODY} cannot be reached ("
    assert str(error.value).startswith(f"model='owner/name' {said}")
    assert "has no copy of it" in str(error.value)
    assert "hf download owner/name --local-dir FOLDER" in str(error.value)
    assert "tokenizer" not in str(error.value)


def test_the_hub_is_asked_once_and_its_libraries_are_told(online, monkeypatch):
    online(NOBODY)
    asked = []
    monkeypatch.setattr(hub, "_silence", lambda endpoint: asked.append(endpoint) or "no route")
    for name in ("a/b", "c/d"):
        assert f"{NOBODY} cannot be reached (no route), and the cache" in hub.why_absent(name)
    assert asked == [NOBODY]
    assert constants.is_offline_mode()


def test_a_copy_in_the_cache_is_used_without_the_hub(online, tmp_path):
    online(NOBODY)
    repository = tmp_path / "cache/models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a1b2")
    (repository / "snapshots/a1b2").mkdir(parents=True)
    (repository / "snapshots/a1b2/config.json").write_text("{}")
    assert hub.why_absent("owner/name") == ""
    assert hub.why_absent("owner/other")


def test_a_revision_of_a_hub_id_is_looked_up_by_itself(online, tmp_path, monkeypatch):
    online(NOBODY)
    snapshots, asked = tmp_path / "cache/models--owner--name/snapshots", []
    (snapshots / "a1b2").mkdir(parents=True)
    (snapshots / "a1b2/config.json").write_text("{}")
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs/v1.0").write_text("a1b2")
    assert hub.why_absent("owner/name@v1.0") == ""
    assert "`hf download owner/name --revision v2 --local-dir FOLDER`" in hub.why_absent("owner/name@v2")
    check_model("owner/name@v1.0")
    monkeypatch.setattr(layout, "cached_file", lambda *names, revision, **_: asked.append((*names, revision)))
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda **given: asked.append(given) or LlamaConfig())
    read_config("owner/name@v1.0")
    assert asked[0] == ("owner/name", "config.json", "v1.0")
    given = {"pretrained_model_name_or_path": "owner/name", "revision": "v1.0", "trust_remote_code": False}
    assert asked[-1] == given
    (tmp_path / "a@b").mkdir()
    assert hub.split(tmp_path / "a@b") == (str(tmp_path / "a@b"), None)


def test_an_environment_without_network_is_named_as_what_it_is(online, monkeypatch):
    online(NOBODY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.why_absent("owner/name").startswith("HF_HUB_OFFLINE is set, so nothing is fetched, and the cache")


def test_a_hub_that_answers_is_left_to_its_libraries(online):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(401)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        online(f"http://127.0.0.1:{server.server_port}")
        assert hub.why_absent("owner/name") == ""
    assert not constants.is_offline_mode()


def test_a_look_up_that_never_ends_is_not_waited_for(online, monkeypatch):
    online(NOBODY)
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(hub, "_ask", lambda _: ended.wait(30) and "")
    assert "no answer within 0.05 s" in hub.why_absent("owner/name")
    ended.set()
    time.sleep(0)
