"""Whether the processes of a launcher find together, alike and each with its own device."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minimind.findings import OK, PROBLEM, Finding, verdict
from minimind.paths import PACKAGE

TIMEOUT = timedelta(seconds=60)  # nodes of a cluster do not all start at once


def examine_together(findings: list[Finding]) -> int:
    """Compare all processes; the first one prints. `findings` are those of this machine."""
    rank = int(os.environ.get("RANK", 0))
    mine = findings if rank == 0 else []
    place = meeting_place()
    if place.level == PROBLEM:
        return verdict([*mine, place], "")
    try:
        dist.init_process_group("gloo", timeout=TIMEOUT)
        said = exchange({"facts": own_facts(), "findings": [*findings, place]})
        findings = together(said)
    except RuntimeError as error:  # DistNetworkError and DistBackendError are such
        reason = str(error).splitlines()[0]
        mend = "do all nodes run this with one MASTER_ADDR and MASTER_PORT, and does a firewall let them?"
        return verdict([*mine, Finding(PROBLEM, f"process {rank} could not join ({reason}); {mend}")], "")
    code = verdict(findings, "these processes can train together") if rank == 0 else exit_code(findings)
    dist.destroy_process_group()
    return code


def exit_code(findings: list[Finding]) -> int:
    return int(any(finding.level == PROBLEM for finding in findings))


def meeting_place() -> Finding:
    """Whether MASTER_ADDR:MASTER_PORT can serve: torchrun listens there, else the first process has to."""
    address, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0))
    place, is_first = f"{address}:{port}", int(os.environ.get("RANK", 0)) == 0
    launcher_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        return Finding(PROBLEM, f"MASTER_ADDR {address} is no machine ({error.strerror}); mend the name")
    try:
        if launcher_listens:
            socket.create_connection((address, port), timeout=10).close()
        elif is_first:
            with socket.create_server(("", port)):
                pass
    except OSError as error:
        mend = "is a firewall in between?" if launcher_listens else "choose another port: --master_port"
        state = "cannot be reached" if launcher_listens else "is taken"
        return Finding(PROBLEM, f"{place} {state} ({error.strerror or error}); {mend}")
    return Finding(OK, f"the processes meet at {place}")


def own_facts() -> dict[str, Any]:
    """What the other processes need to know about this one."""
    local_rank, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    gpus = torch.cuda.device_count() if cuda else 0
    return {
        "rank": dist.get_rank(),
        "host": socket.gethostname(),
        "gpus": gpus,
        "gpu": str(torch.cuda.get_device_properties(local_rank).uuid) if local_rank < gpus else None,
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "MiniMind": source_version(),
    }


def source_version() -> str:
    """A checkout has no version that can be relied on, so this is one of its code."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def exchange(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process brings, in the order of ranks."""
    brought: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(brought, own)
    return brought


def together(brought: list[dict[str, Any]]) -> list[Finding]:
    """All that is to be said: of the first machine everything, of the others what is not in order."""
    facts = [each["facts"] for each in brought]
    found, hosts = list(brought[0]["findings"]), {facts[0]["host"]}
    for each in brought[1:]:
        host = each["facts"]["host"]
        if host not in hosts:
            found += [f._replace(text=f"{host}: {f.text}") for f in each["findings"] if f.level != OK]
            hosts.add(host)
    alike, own = agreement(facts), own_gpus(facts)
    # Where processes share a GPU or have different libraries, NCCL would hang rather than answer.
    works = [] if exit_code([*alike, *own]) else [collective("gloo")]
    if works and all(fact["gpu"] for fact in facts):
        works.append(collective("nccl"))
    return [*found, *alike, *own, *works]


def agreement(facts: list[dict[str, Any]]) -> list[Finding]:
    """Whether all processes run the same versions."""
    found = []
    for name in ("Python", "PyTorch", "CUDA", "NCCL", "MiniMind"):
        versions: dict[Any, list[str]] = {}
        for fact in facts:
            versions.setdefault(fact[name], []).append(f"{fact['rank']} on {fact['host']}")
        if len(versions) > 1:
            said = "; ".join(f"{version}: process {', '.join(where)}" for version, where in versions.items())
            found.append(Finding(PROBLEM, f"{name} differs ({said}); install the same everywhere"))
    return found or [Finding(OK, f"{len(facts)} processes with the same versions")]


def own_gpus(facts: list[dict[str, Any]]) -> list[Finding]:
    """Whether each process has a GPU for itself, or none has one."""
    if not any(fact["gpus"] for fact in facts):
        return [Finding(OK, f"no GPUs: the {len(facts)} processes share the processors")]
    found, owner = [], dict[str, str]()
    for fact in facts:
        who = f"process {fact['rank']} on {fact['host']}"
        if fact["gpu"] is None:
            mend = "start as many processes as there are GPUs: --nproc_per_node"
            found.append(Finding(PROBLEM, f"{who} has no GPU of its own ({fact['gpus']} seen there); {mend}"))
        elif fact["gpu"] in owner:
            mend = "mend CUDA_VISIBLE_DEVICES"
            found.append(Finding(PROBLEM, f"{who} has the GPU of process {owner[fact['gpu']]}; {mend}"))
        else:
            owner[fact["gpu"]] = fact["rank"]
    return found or [Finding(OK, "each process has its own GPU")]


def collective(backend: str) -> Finding:
    """Whether a sum over all processes comes out right."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    value = torch.tensor(dist.get_rank() + 1, device=device)
    size = dist.get_world_size()
    try:
        if backend == "nccl":
            torch.cuda.set_device(device)
        group = dist.new_group(backend=backend, timeout=TIMEOUT)
        dist.all_reduce(value, group=group, async_op=True).wait(TIMEOUT)
    except RuntimeError as error:
        mend = "NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME) names the network card"
        return Finding(PROBLEM, f"a sum over {backend} failed ({str(error).splitlines()[0]}); {mend}")
    if value.item() != size * (size + 1) // 2:
        return Finding(PROBLEM, f"a sum over {backend} is {value.item()}, not {size * (size + 1) // 2}")
    return Finding(OK, f"a sum over {size} processes works ({backend})")
