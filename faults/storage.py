"""Disks that fill up, folders that vanish, checkpoints that rot."""

from __future__ import annotations

import shutil
from typing import Any

from faults.disk import Disk
from faults.runs import Lab, Run, same_bits
from minimind.train.checkpoint import STATE, is_whole


def disk_fills(lab: Lab) -> dict[str, Any]:
    """The disk fills up in the middle of a run: once until somebody makes room, then until the end."""
    with Disk(lab.folder / "disk") as disk:
        run = lab.run("disk/run", steps=300, log_interval=1)
        process = run.start()
        assert process.until_training(20)
        disk.fill(process)
        failed = lambda: process.said().count("could not write") >= 2  # noqa: E731
        assert process.until(failed), process.said()[-2000:]
        assert all(is_whole(path) for path in run.checkpoints), "the checkpoints before are damaged"
        assert run.checkpoints, "the checkpoints before are gone"
        kept = run.checkpoints
        disk.clear(process)
        assert process.until(lambda: run.checkpoints > kept), process.said()[-2000:]
        disk.fill(process)
        code = process.end()
        assert code == 1, f"exit code {code} on a full disk"
        said = process.said()
        assert "error: could not write" in said, said[-2000:]
        assert "MB are free there" in said, said[-2000:]
        assert "Traceback" not in said, said[-2000:]
        kept = run.checkpoints
        assert kept, "the checkpoints before are gone"
        assert all(is_whole(path) for path in kept), "the checkpoints before are damaged"
        disk.clear()
        run.start("--from_resume=1").must_succeed()
        assert same_bits(run, lab.reference(run)), "other weights than the undisturbed run's"
        return {"disk": disk.kind, "said": "could not write …; MB are free there", "weights": "the same bits"}


def disk_full_from_the_first_save(lab: Lab) -> dict[str, Any]:
    with Disk(lab.folder / "disk_first") as disk:
        run = lab.run("disk_first/run", steps=200, save_interval=100)
        process = run.start()
        assert process.until_training()
        disk.fill(process)
        code = process.end()
        assert code == 1, f"exit code {code} on a full disk"
        said = process.said()
        assert "error: could not write" in said, said[-2000:]
        assert "Traceback" not in said, said[-2000:]
        assert not run.checkpoints
        disk.clear()
        run.start("--from_resume=1").must_succeed()
        assert same_bits(run, lab.reference(run)), "other weights than the undisturbed run's"
        return {"disk": disk.kind, "exit code": code}


def folder_deleted(lab: Lab) -> dict[str, Any]:
    """Somebody deletes out_dir. The training makes it anew, says so, and loses nothing but its past."""
    run = lab.run("deleted", steps=200)
    process = run.start()
    assert process.until_training(20)
    gone = run.folder / "gone"
    (run.folder / "out").rename(gone)  # at one stroke: the training writes into it meanwhile
    shutil.rmtree(gone, ignore_errors=True)
    process.must_succeed()
    assert "is gone" in process.said(), process.said()[-2000:]
    assert same_bits(run, lab.reference(run)), "other weights than the undisturbed run's"
    return {"said": "… is gone and made anew", "weights": "the same bits"}


def damaged_checkpoints(lab: Lab) -> dict[str, Any]:
    """The newest checkpoint has flipped bytes, is cut short, or its checksums are empty."""
    stopped = lab.run("damage", steps=120)
    process = stopped.start()
    assert process.until_training(60)
    process.kill()
    for name, damage in (("flipped", flip), ("cut", cut), ("empty", empty_checksums)):
        run = stopped.copy(lab.folder / f"damage_{name}")
        before, newest = run.checkpoints[-2:]
        damage(run)
        process = run.start("--from_resume=1")
        process.must_succeed()
        assert f"{newest} is damaged" in process.said(), f"{name}: not noticed"
        assert f"resumed at step {int(before.name[5:])} " in process.said(), f"{name}: not the one before"
        assert same_bits(run, lab.reference(run)), f"{name}: other weights than the undisturbed run's"
    return {"damage": "flipped bytes, cut short, empty checksums", "weights": "the same bits"}


def flip(run: Run) -> None:
    path = run.checkpoints[-1] / STATE
    content = bytearray(path.read_bytes())
    for place in range(1000, len(content), len(content) // 10):
        content[place] ^= 0xFF
    path.write_bytes(content)


def cut(run: Run) -> None:
    path = run.checkpoints[-1] / STATE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_checksums(run: Run) -> None:
    run.checkpoints[-1].with_suffix(".sha256").write_bytes(b"")
