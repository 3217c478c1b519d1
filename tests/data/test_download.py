"""`minimind data download` with the real clients, against a hub on this machine that fails as hubs do."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import FakeHub
from filelock import FileLock

from minimind.data import download as command
from minimind.data import hubs
from minimind.errors import UserError
from minimind.paths import ROOT

pytest.importorskip("modelscope_hub", reason="needs the extra `download`")
pytest.importorskip("huggingface_hub", reason="needs the extra `download`")

SOURCES = ("modelscope", "huggingface")
SMALL = {
    "pretrain_hq.jsonl": b'{"text": "a"}\n' * 1000,
    "sft_mini_512.jsonl": b'{"conversations": []}\n' * 100,
    "README.md": b"# Data",
    "../outside.jsonl": b"{}",
}
LARGE = {"dpo.jsonl": os.urandom(8 << 20)}  # the clients write in pieces of up to 1 MiB


@pytest.fixture
def download(tmp_path):
    """Run the command. Returns its exit code, its output, and the folder of the files."""
    folder = tmp_path / "data"

    def run(url: str, source: str, *arguments: str, timeout: float = 60) -> tuple[int, str, Path]:
        command = [sys.executable, "-m", "minimind", "data", "download", *arguments]
        done = subprocess.run(
            [*command, "--source", source, "--data_dir", str(folder)],
            env=environment(url, tmp_path),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr, folder

    return run


def environment(url: str, home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    for_clients = {"MODELSCOPE_ENDPOINT": url, "HF_ENDPOINT": url, "HOME": str(home), "HF_HOME": str(home)}
    return kept | for_clients | {"PYTHONPATH": str(ROOT)}


def left_in(folder: Path) -> set[str]:
    """Names of the files in a folder and below it, without locks."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if not path.name.endswith("lock")}


@pytest.mark.parametrize("source", SOURCES)
def test_the_recommended_pair(download, source):
    with FakeHub(SMALL) as hub:
        code, said, folder = download(hub.url, source)
        assert code == 0, said
        assert re.search(r"pretrain_hq\.jsonl +0\.0 MB\nsft_mini_512\.jsonl +0\.0 MB\nfrom ", said)
        assert said.count("complete, SHA-256 as published") == 2
        assert left_in(folder) == {"pretrain_hq.jsonl", "sft_mini_512.jsonl"}
        assert (folder / "pretrain_hq.jsonl").read_bytes() == SMALL["pretrain_hq.jsonl"]
        hub.ranges.clear()
        code, said, _ = download(hub.url, source)
        assert code == 0
        assert said.count("is there already") == 2
        assert not hub.ranges


@pytest.mark.parametrize("source", SOURCES)
def test_a_broken_connection_goes_on_by_itself(download, source):
    with FakeHub(LARGE, breaks=[5 << 20]) as hub:
        code, said, folder = download(hub.url, source, "dpo.jsonl")
        assert code == 0, said
        assert (folder / "dpo.jsonl").read_bytes() == LARGE["dpo.jsonl"]
    first, second = hub.ranges
    assert first is None
    assert int(re.match(r"bytes=(\d+)-", second)[1]) >= 4 << 20


@pytest.mark.parametrize("source", SOURCES)
def test_a_killed_download_goes_on_with_the_next_command(download, source, tmp_path):
    with FakeHub(LARGE, breaks=[5 << 20]) as hub:
        hub.breaks.extend([0] * 100)  # further tries of this command get nothing
        command = [sys.executable, "-m", "minimind", "data", "download", "dpo.jsonl", "--source", source]
        process = subprocess.Popen(
            [*command, "--data_dir", str(tmp_path / "data")], env=environment(hub.url, tmp_path)
        )
        deadline = time.monotonic() + 30
        while len(hub.ranges) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.wait()
        assert not (tmp_path / "data" / "dpo.jsonl").exists()
        hub.ranges.clear()
        hub.breaks.clear()
        code, said, folder = download(hub.url, source, "dpo.jsonl")
        assert code == 0, said
        assert (folder / "dpo.jsonl").read_bytes() == LARGE["dpo.jsonl"]
        assert left_in(folder) == {"dpo.jsonl"}
    (asked,) = hub.ranges
    assert int(re.match(r"bytes=(\d+)-", asked)[1]) >= 4 << 20


@pytest.mark.parametrize("source", SOURCES)
def test_a_wrong_checksum_leaves_nothing(download, source):
    with FakeHub(SMALL, sha256={"pretrain_hq.jsonl": "0" * 64}) as hub:
        code, said, folder = download(hub.url, source, "pretrain_hq.jsonl")
    assert code == 1
    assert "pretrain_hq.jsonl: what arrived is not what" in said
    assert left_in(folder) == set()


@pytest.mark.parametrize("source", SOURCES)
def test_files_without_a_published_checksum(download, source):
    with FakeHub(SMALL, sha256={"pretrain_hq.jsonl": None}) as hub:
        code, said, folder = download(hub.url, source, "pretrain_hq.jsonl")
    assert code == 0, said
    assert said.endswith("pretrain_hq.jsonl: complete\n")
    assert left_in(folder) == {"pretrain_hq.jsonl"}


@pytest.mark.parametrize("source", SOURCES)
def test_an_unknown_name_lists_what_there_is(download, source):
    with FakeHub(SMALL) as hub:
        code, said, _ = download(hub.url, source, "sft_mini.jsonl")
    assert code == 1
    assert "has no sft_mini.jsonl in" in said
    assert re.search(r"there are:\n  pretrain_hq\.jsonl +0\.0 MB\n  sft_mini_512\.jsonl +0\.0 MB\n$", said)


@pytest.mark.parametrize("source", SOURCES)
def test_another_file_of_that_name_is_not_touched(download, source, tmp_path):
    (tmp_path / "data").mkdir()
    mine = tmp_path / "data" / "sft_mini_512.jsonl"
    mine.write_bytes(SMALL["sft_mini_512.jsonl"].replace(b"[]", b"{}"))
    with FakeHub(SMALL) as hub:
        code, said, folder = download(hub.url, source)
    assert code == 1
    assert "sft_mini_512.jsonl exists and is another file than the hub's; move it away" in said
    assert left_in(folder) == {"sft_mini_512.jsonl"}
    assert b"{}" in mine.read_bytes()


@pytest.mark.parametrize("source", SOURCES)
def test_nobody_listens(download, source):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start = time.monotonic()
    code, said, folder = download(f"http://127.0.0.1:{port}", source)
    assert time.monotonic() - start < 10
    assert code == 1
    assert f"cannot be reached (no connection to 127.0.0.1:{port}): look at the network" in said
    assert said.count("\n") == 1
    assert left_in(folder) == set()


@pytest.mark.parametrize("source", SOURCES)
def test_a_hub_that_refuses_or_fails(download, source):
    with FakeHub(SMALL, statuses=[404] * 20) as hub:
        code, said, _ = download(hub.url, source)
    assert code == 1
    assert "does not list the files of" in said
    assert said.count("\n") == 1


def test_a_name_that_takes_for_ever_to_resolve(monkeypatch):
    """And a hub that takes connections but is silent: one sentence each, in bounded time."""
    monkeypatch.setattr(hubs, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(hubs.socket, "create_connection", lambda *_: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached \(no connection to modelscope\.cn:443\)"):
        hubs.connect("modelscope")
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("source", SOURCES)
def test_a_silent_hub(source, monkeypatch):
    monkeypatch.setattr(hubs, "LISTING_SECONDS", 0.5)
    hub = hubs.HUBS[source]()
    monkeypatch.setattr(hub, "_listing", lambda: time.sleep(5))
    with pytest.raises(TimeoutError, match="no answer in"):
        hub.files()


def test_a_client_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(UserError, match=r"pip install -e '/.*\[download\]'"):
        hubs.connect("modelscope")


@pytest.mark.parametrize(
    ("endpoint", "variables", "expected"),
    [
        ("https://a.cn", {}, ("a.cn", 443)),
        ("http://a.cn:8080/x", {}, ("a.cn", 8080)),
        ("https://a.cn", {"https_proxy": "http://proxy:3128"}, ("proxy", 3128)),
        ("https://a.cn", {"https_proxy": "proxy:3128"}, ("proxy", 3128)),
        ("https://a.cn", {"all_proxy": "socks5h://127.0.0.1"}, ("127.0.0.1", 1080)),
        ("https://a.cn", {"http_proxy": "http://proxy:3128"}, ("a.cn", 443)),
        ("https://a.cn", {"https_proxy": "http://proxy:3128", "no_proxy": "a.cn"}, ("a.cn", 443)),
    ],
)
def test_where_requests_go(endpoint, variables, expected, monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hubs.address(endpoint) == expected


def test_addresses_that_are_none(download):
    with pytest.raises(UserError, match="is no address"):
        hubs.address("http://a:b:c")
    for source in SOURCES:
        code, said, _ = download("http://x:abc", source)
        assert code == 1
        assert re.search(r"is no address.* mend (it|the environment variable that names it)\n$", said)


def test_one_download_at_a_time(download, tmp_path):
    partial = tmp_path / "data" / ".cache" / "download" / "modelscope"
    partial.mkdir(parents=True)
    with FakeHub(SMALL) as hub, FileLock(partial / "download.lock"):
        code, said, _ = download(hub.url, "modelscope")
    assert code == 1
    assert f"another download into {tmp_path / 'data'} is running; wait for it" in said


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    file = hubs.HubFile("a.jsonl", 3_000_000_000, None)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000_000))
    with pytest.raises(UserError, match=r"has 1\.00 GB free and 3\.00 GB are to come: 2\.00 GB are missing"):
        command.check_room([file], tmp_path, tmp_path)
    with (tmp_path / "a.jsonl.incomplete").open("wb") as partial:
        partial.truncate(2_500_000_000)
    command.check_room([file], tmp_path, tmp_path)
