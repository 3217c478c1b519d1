"""The hubs that publish MiniMind's data, through their official clients: what files there are; fetching one.

    hub = connect("modelscope")
    files = hub.files()
    hub.fetch(files["sft_mini_512.jsonl"], Path("dataset/.cache/download/modelscope"))

The data is public: no login is used, and none is sent.
"""

from __future__ import annotations

import os
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from minimind.errors import UserError
from minimind.paths import pip_install
from minimind.threads import Result, in_own_thread

# The clients' own tries go on for half a minute and more.
CONNECT_SECONDS = 6.0
LISTING_SECONDS = 15.0

SUFFIXES = (".jsonl", ".jsonl.gz")  # of data; the repositories hold pictures and papers too


class HubFile(NamedTuple):
    name: str  # with the folders of the repository
    size: int  # bytes
    sha256: str | None  # None where the hub publishes none


class Hub(ABC):
    """A dataset repository on a hub.

    Attributes:
        endpoint: address of the hub, or of the mirror that the client is told to use.
        errors: what the client raises when the hub or the network fails.
    """

    title: str
    repo: str
    endpoint: str
    errors: tuple[type[Exception], ...]

    def files(self) -> dict[str, HubFile]:
        """The data files by name. Raises: one of `errors`."""
        return {
            file.name: file
            for file in within(LISTING_SECONDS, self._listing)
            if file.name.endswith(SUFFIXES) and ".." not in PurePosixPath("/", file.name).parts[1:]
        }

    @abstractmethod
    def _listing(self) -> list[HubFile]: ...

    @abstractmethod
    def fetch(self, file: HubFile, folder: Path) -> Path:
        """Download `file` into `folder`, going on from what an earlier call has left there.

        Returns: where it lies. Raises: one of `errors`, or OSError where it cannot be written.
        """


class ModelScope(Hub):
    title, repo = "ModelScope", "gongjy/minimind_dataset"

    def __init__(self) -> None:
        # Read when the client is imported. An hour for one file, its default, is too short on a slow line.
        os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", str(24 * 3600))
        os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "ERROR")
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
        from modelscope_hub import HubApi, HubConfig, HubError

        config = HubConfig(token="")  # no login is looked for
        self._api, self.endpoint = HubApi(config), config.endpoint or ""  # it always has one by now
        self.errors = (HubError, OSError)

    def _listing(self) -> list[HubFile]:
        found = self._api.list_repo_files(self.repo, "dataset")
        return [
            HubFile(file.path, file.size, file.sha256.lower() if file.sha256 else None)
            for file in found
            if file.type == "blob"
        ]

    def fetch(self, file: HubFile, folder: Path) -> Path:
        return self._api.download_file(
            self.repo,
            "dataset",
            file.name,
            local_dir=folder,
            cache_dir=folder,  # where the client keeps its lock
            file_size=file.size,
        )


class HuggingFace(Hub):
    title, repo = "Hugging Face", "jingyaogong/minimind_dataset"

    def __init__(self) -> None:
        import httpx2
        from huggingface_hub import HfApi, constants, logging

        logging.set_verbosity_error()
        constants.DOWNLOAD_CHUNK_SIZE = 1 << 20  # bytes, what is lost when a connection breaks; it is 10 MiB
        self._api, self.endpoint = HfApi(token=False), constants.ENDPOINT
        self.errors = (httpx2.HTTPError, OSError)

    def _listing(self) -> list[HubFile]:
        from huggingface_hub.hf_api import RepoFile

        found = self._api.list_repo_tree(self.repo, repo_type="dataset", recursive=True)
        return [
            HubFile(file.path, file.size, file.lfs.sha256 if file.lfs else None)
            for file in found
            if isinstance(file, RepoFile)
        ]

    def fetch(self, file: HubFile, folder: Path) -> Path:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        # `hf_hub_download` throws away what it has when the connection breaks; this part of it does not.
        path = folder / f"{file.name}.incomplete"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as out:
            if out.tell() > file.size:  # of another version
                out.truncate(0)
            http_get(
                hf_hub_url(self.repo, file.name, repo_type="dataset"),
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(token=False),
                expected_size=file.size,
                displayed_filename=file.name,
            )
        return path


HUBS: dict[str, type[Hub]] = {"modelscope": ModelScope, "huggingface": HuggingFace}


def connect(source: str) -> Hub:
    """The hub `source`, which takes connections. Raises: UserError within ten seconds when it does not."""
    try:
        hub = HUBS[source]()
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; {pip_install('download')}") from None
    except ValueError as error:
        raise UserError(f"HF_ENDPOINT or MODELSCOPE_ENDPOINT is no address ({error}); mend it") from None
    host, port = address(hub.endpoint)
    if not takes_connections(host, port):
        other = next(name for name in HUBS if name != source)
        raise UserError(
            f"{hub.title} cannot be reached (no connection to {host}:{port}): look at the network and at "
            f"HTTPS_PROXY, try --source {other}, or copy the files into dataset/ by other means"
        )
    return hub


def address(endpoint: str) -> tuple[str, int]:
    """Host and port that requests to `endpoint` go to: its own, or those of the proxy that is set for it."""
    parts = urlsplit(endpoint)
    proxies = {} if proxy_bypass(parts.netloc) else getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 1080)
    except ValueError:
        port = None
    if not parts.hostname or not port:
        raise UserError(f"{proxy or endpoint!r} is no address; mend the environment variable that names it")
    return parts.hostname, port


def takes_connections(host: str, port: int) -> bool:
    """Whether a connection comes about in `CONNECT_SECONDS`."""
    try:
        within(CONNECT_SECONDS, lambda: socket.create_connection((host, port), CONNECT_SECONDS).close())
    except (OSError, UnicodeError):
        return False
    return True


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What `call` returns or raises; TimeoutError after `seconds`.

    In a thread of its own, since no timeout of a socket covers the time that a name takes to be resolved, nor
    the further tries of a client.
    """
    answer = in_own_thread(call)
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer in {seconds:.0f} seconds")
    return answer.result()
