"""Names on a hub: one request tells whether it has them; rows of its data sets; what is wrong is said at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from peftree.data.rows import load_data
from peftree.errors import ConfigError, DataError
from peftree.settings import RunConfig, load_config
from peftree.tasks.loading import is_local, read_config
from peftree.trusted import on_hub

KNOWN = {"/api/models/org/name", "/api/datasets/org/name"}
pytestmark = pytest.mark.enable_socket


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine that knows one model and one data set; the requests that it got."""
    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = json.dumps({"id": "org/name", "siblings": [], "tags": []}).encode()
            self.send_response(200 if self.path in KNOWN else 404)
            self.send_header("X-Error-Code", "" if self.path in KNOWN else "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    on_hub.cache_clear()
    yield asked
    server.shutdown()
    server.server_close()
    on_hub.cache_clear()


def test_a_misspelt_model_costs_one_request(hub: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"The hub has no model 'org/nam'.*spelling"):
        read_config("org/nam", {}, ())
    assert hub == ["/api/models/org/nam"]
    assert not is_local("org/name")


def test_a_name_that_no_hub_has_is_not_asked_for(hub: list[str]) -> None:
    with pytest.raises(ConfigError, match="The hub has no model 'a b'"):
        on_hub("a b")
    assert not hub


def test_without_a_network_one_error_comes_at_once(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    for kind, what in (("model", "model"), ("dataset", "data set")):
        with pytest.raises(ConfigError, match=f"The hub cannot be asked for the {what} 'org/other'"):
            on_hub("org/other", kind)


def test_files_that_were_fetched_before_are_used_without_a_network(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = tmp_path / "models--org--name"
    (kept / "snapshots" / "abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots" / "abc" / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert is_local("org/name")


@pytest.fixture
def here(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set under a name that the hub has, where `datasets` finds it first; its caches are apart."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for split, count in (("train", 30), ("validation", 5)):
        lines = (json.dumps({"prompt": f"q{n}", "completion": f"{split} {n}"}) for n in range(count))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return folder


def test_rows_of_a_hub_are_read_by_split(here: Path) -> None:
    config = load_config(None, ["model=m", "data.train.hub=org/name", "data.train.rows=7", "data.valid.hub=org/name"])
    assert config.data.train == "hub:org/name?split=train&rows=7"
    found = load_data(config.data.train, config.data.valid)
    assert found.task == "generation" and len(found.train) == 7 and len(found.valid) == 5
    assert found.train[6][:3] == ("q6", "train 6", "org/name train row 7")
    assert found.valid[0].target == "validation 0"
    again = RunConfig(model="m", data={"train": "hub:org/name"})
    assert again.data.train == "hub:org/name?split=train" and len(load_data(again.data.train).train) == 27


def test_a_fault_in_a_row_of_a_hub_names_the_row(here: Path) -> None:
    lines = [json.dumps({"prompt": f"q{n}", "completion": "" if n == 16 else "a"}) for n in range(20)]
    (here / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"1 of 20 rows lack .*: org/name train row 17"):
        load_data("hub:org/name?split=train")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("hub:org/name?split=trian", "split trian: .*trian.*Name one of its splits"),
        ("hub:org/name?split=train&config=fr", "split train: .*fr.*Name one of its splits"),
    ],
)
def test_a_split_or_configuration_that_is_not_there_is_named(source: str, why: str, here: Path) -> None:
    with pytest.raises(DataError, match=why):
        load_data(source)


def test_a_misspelt_data_set_costs_one_request(here: Path, hub: list[str]) -> None:
    with pytest.raises(ConfigError, match="The hub has no data set 'org/nam'"):
        load_data("hub:org/nam?split=train")
    assert hub == ["/api/datasets/org/nam"]


@pytest.mark.parametrize(
    "source", [{"hub": 3}, {"split": "train"}, {"hub": "org/name", "rows": 0}, {"hub": "org/name", "size": 3}]
)
def test_a_source_of_another_form_is_refused(source: Any) -> None:
    with pytest.raises(ValueError, match=r"hub is the name, as org/name|is not a number of rows"):
        RunConfig(model="m", data={"train": source})
