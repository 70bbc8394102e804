"""The hub, against a server on this machine that behaves like it, well and badly."""

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from npllm.errors import HubError, NpllmError
from npllm.hub import fetch, looks_like_hub_id

MODEL = "someone/tiny"
WEIGHTS = bytes(range(256)) * 64
SMALL = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
NEVER = ["README.md", "consolidated.safetensors", "model.gguf", "onnx/model.onnx", "pytorch_model.bin", "modeling_tiny.py"]


def write(folder: Path, names: list[str], content: bytes = b"{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("npllm.hub.PAUSES", (0.0, 0.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    write(folder, SMALL + NEVER)
    write(folder, ["model.safetensors"], WEIGHTS)
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    with HubServer({MODEL: folder}) as hub:
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def get(hub: HubServer, cache: Path, model_id: str = MODEL, **options: Any) -> Path:
    return fetch(model_id, cache_dir=cache, endpoint=hub.url, **options)


def shard(folder: Path, shards: list[str], names: list[str] | None = None) -> None:
    """Serve shards in place of the single file, named by an index."""
    (folder / "model.safetensors").unlink()
    write(folder, names if names is not None else shards, WEIGHTS)
    index = {"weight_map": {f"tensor.{number}": name for number, name in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gpt2", True),
        ("Qwen/Qwen3-0.6B", True),
        ("a/b/c", False),
        ("./gpt2", False),
        ("/gpt2", False),
        ("gpt2/", False),
        ("", False),
        ("a--b/c", False),
        ("a/b..c", False),
        ("a/b.git", False),
        ("a b", False),
        ("a/" + "b" * 96, False),
        ("gpt2\n", False),
    ],
)
def test_hub_ids_are_told_from_paths(source: str, expected: bool) -> None:
    assert looks_like_hub_id(source) is expected


def test_an_invalid_id_is_refused_without_a_request() -> None:
    with pytest.raises(HubError, match="'no/such/folder': no such folder, nor spelled like a hub id"):
        fetch("no/such/folder")


def test_fetches_what_npllm_reads_and_nothing_else(hub: HubServer, cache: Path) -> None:
    folder = get(hub, cache)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*SMALL, "model.safetensors"])
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.fetched()[0] == "config.json"
    assert hub.fetched()[-1] == "model.safetensors"


def test_a_second_fetch_transfers_nothing(hub: HubServer, cache: Path) -> None:
    folder = get(hub, cache)
    hub.requests.clear()
    assert get(hub, cache) == folder
    assert hub.fetched() == []


def test_a_commit_in_the_cache_needs_no_request(hub: HubServer, cache: Path) -> None:
    folder = get(hub, cache)
    hub.requests.clear()
    assert get(hub, cache, revision=hub.commit(MODEL)) == folder
    assert hub.requests == []


def test_fetches_exactly_the_shards_of_the_index(folder: Path, hub: HubServer, cache: Path) -> None:
    shard(folder, ["model-1.safetensors", "model-2.safetensors"])
    write(folder, ["model-3.safetensors"])
    fetched = {path.name for path in get(hub, cache).iterdir()}
    assert fetched == {*SMALL, "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model-1.safetensors", "is not the name of a .safetensors file inside the repository"),
        ("/etc/model.safetensors", "is not the name"),
        ("pytorch_model.bin", "is not the name"),
        ("model-9.safetensors", "names the shard model-9.safetensors, which the repository lacks"),
    ],
)
def test_an_index_that_misleads_is_refused(folder: Path, hub: HubServer, cache: Path, name: str, message: str) -> None:
    shard(folder, [name], names=[])
    with pytest.raises(HubError, match=message):
        get(hub, cache)


def test_config_only(hub: HubServer, cache: Path) -> None:
    assert [path.name for path in get(hub, cache, config_only=True).iterdir()] == ["config.json"]


def test_an_unsupported_model_fails_before_its_weights_are_downloaded(hub: HubServer, cache: Path) -> None:
    def refuse(config: dict[str, Any]) -> None:
        raise NpllmError(f"no support for {config}")

    with pytest.raises(NpllmError, match=r"no support for \{\}"):
        get(hub, cache, check=refuse)
    assert hub.fetched() == ["config.json"]


def test_only_pickles(folder: Path, hub: HubServer, cache: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(HubError, match=rf"pytorch_model.bin.*npllm convert {MODEL} OUT"):
        get(hub, cache)
    fetched = {path.name for path in get(hub, cache, pickles=True).iterdir()}
    assert fetched == {*SMALL, "pytorch_model.bin"}


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "has no config.json"), ("model.safetensors", "has only pickled weights")],
)
def test_a_repository_without_a_needed_file(folder: Path, hub: HubServer, cache: Path, missing: str, message: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(HubError, match=message):
        get(hub, cache)


def test_a_repository_without_weights(folder: Path, hub: HubServer, cache: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).unlink()
    with pytest.raises(HubError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        get(hub, cache)


REFUSALS = [
    (401, None, r"refuses someone/tiny \(401\): set HF_TOKEN"),
    (401, "RepoNotFound", "for a private model set HF_TOKEN"),
    (403, "GatedRepo", "is gated: accept its licence at http://127.0.0.1:.*set HF_TOKEN"),
    (403, None, r"refuses someone/tiny \(403\)"),
    (404, "RepoNotFound", "no model someone/tiny at .*check the spelling"),
    (404, None, "no model someone/tiny at "),
    (404, "RevisionNotFound", "has no revision 'main'"),
    (500, None, "answers 500 for someone/tiny: try again later"),
]


@pytest.mark.parametrize(("status", "code", "message"), REFUSALS)
def test_each_refusal_says_what_to_do(hub: HubServer, cache: Path, status: int, code: str | None, message: str) -> None:
    hub.faults.status, hub.faults.error_code = status, code
    with pytest.raises(HubError, match=message) as caught:
        get(hub, cache)
    assert "\n" not in str(caught.value)


def test_unknown_model_and_revision(hub: HubServer, cache: Path) -> None:
    with pytest.raises(HubError, match="no model someone/else"):
        get(hub, cache, "someone/else")
    with pytest.raises(HubError, match="no revision 'v9'"):
        get(hub, cache, revision="v9")


def test_unreachable_without_a_copy(hub: HubServer, cache: Path) -> None:
    hub.__exit__(None, None, None)
    with pytest.raises(HubError, match=r"cannot reach http://127.0.0.1.*HF_ENDPOINT") as caught:
        get(hub, cache)
    assert "\n" not in str(caught.value)


def test_unreachable_or_failing_with_a_copy(hub: HubServer, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = get(hub, cache)
    hub.faults.status = 500
    with caplog.at_level(logging.WARNING, "npllm"):
        assert get(hub, cache) == folder
    [warning] = [record.getMessage() for record in caplog.records if record.name == "npllm"]
    assert warning.endswith(f"answers 500 for {MODEL}: try again later; using the copy in the cache, {folder}")


def test_unreachable_with_a_copy_that_lacks_weights(hub: HubServer, cache: Path) -> None:
    get(hub, cache, config_only=True)
    hub.faults.status = 500
    assert get(hub, cache, config_only=True).is_dir()
    with pytest.raises(HubError, match=r"answers 500.*the copy in the cache is incomplete .*model.safetensors"):
        get(hub, cache)


def test_a_silent_hub_is_given_up(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npllm.hub.TIMEOUT", 0.1)
    hub.faults.delay = 0.5
    with pytest.raises(HubError, match="cannot reach"):
        get(hub, cache)


def test_a_transfer_that_breaks_off_once_is_resumed(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # what is resumed is whole chunks
    remarks: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("huggingface_hub.file_download"), "callHandlers", remarks.append)
    hub.faults.breaks["model.safetensors"] = 1
    assert (get(hub, cache) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges == [f"bytes={len(WEIGHTS) // 2}-"]
    assert not [each for each in remarks if each.levelno >= logging.WARNING]


def test_a_transfer_that_keeps_breaking_off_leaves_nothing_that_looks_whole(
    folder: Path, hub: HubServer, cache: Path
) -> None:
    shard(folder, ["model-1.safetensors", "model-2.safetensors"])
    write(folder, ["model-2.safetensors"], WEIGHTS[1:])
    hub.faults.breaks["model-2.safetensors"] = 100
    hub.faults.reset = True
    with pytest.raises(HubError, match=r"the download of model-2.safetensors of .* broke off .*complete are kept"):
        get(hub, cache)
    assert not list(cache.rglob("snapshots/*/model-2.safetensors"))
    hub.faults.status = 500
    with pytest.raises(HubError, match="answers 500"):
        get(hub, cache)
    hub.faults.status, hub.faults.breaks = None, {}
    hub.requests.clear()
    assert (get(hub, cache) / "model-2.safetensors").read_bytes() == WEIGHTS[1:]
    assert hub.fetched() == ["model-2.safetensors"]


def test_a_broken_update_leaves_the_old_commit_usable(folder: Path, hub: HubServer, cache: Path) -> None:
    old = get(hub, cache)
    write(folder, ["model.safetensors"], WEIGHTS[::-1])
    hub.faults.breaks["model.safetensors"], hub.faults.reset = 100, True
    with pytest.raises(HubError, match="broke off"):
        get(hub, cache)
    hub.faults.status = 500
    assert get(hub, cache) == old
    hub.faults.status, hub.faults.breaks = None, {}
    new = get(hub, cache)
    assert new != old
    assert (new / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    hub.faults.status = 500
    assert get(hub, cache) == new


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_takes_no_more(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*args: object, **options: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(HubError, match=rf"cannot write config.json to .*cache \({os.strerror(number)}\).*HF_HOME"):
        get(hub, cache)


def test_a_cache_that_cannot_be_a_folder(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match=r"cannot write config.json to .*file.cache \(.*\).*HF_HOME"):
        get(hub, tmp_path / "file" / "cache")


def test_environment_variables_and_progress_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    """As a user has it: the environment alone says where; bars are drawn for a terminal and for nothing else."""
    pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
    termios = pytest.importorskip("termios", reason="needs pseudo-terminals")
    code = f"from npllm.hub import fetch; print(fetch({MODEL!r}))"
    with HubServer({MODEL: folder}, token="secret") as hub:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "secret",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 100))
        command = [sys.executable, "-c", code]
        subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=theirs, check=True, text=True)
        os.close(theirs)
        assert b"model.safetensors" in os.read(ours, 100_000)
        os.close(ours)
        write(folder, ["model.safetensors"], WEIGHTS[::-1])
        result = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    assert result.stderr == ""
    assert Path(result.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")
    environment["HF_HUB_OFFLINE"] = "1"
    offline = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    assert offline.stdout == result.stdout
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    assert "using the copy in the cache" in offline.stderr
