"""What an examination finds: one line for each thing, good or bad, with what to do about it."""

from __future__ import annotations

from typing import NamedTuple

OK, WARNING, PROBLEM = "OK", "WARNING", "PROBLEM"


class Finding(NamedTuple):
    level: str  # OK, WARNING or PROBLEM
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.text}"


def verdict(findings: list[Finding], good: str) -> int:
    """Print all `findings` and what they come to. Returns the exit code: 1 where something must be mended."""
    for finding in findings:
        print(finding)
    problems, warnings = (sum(f.level == level for f in findings) for level in (PROBLEM, WARNING))
    if problems:
        print(f"verdict: {problems} to mend first")
    else:
        print(f"verdict: {good}" + (f", with {warnings} to look at" if warnings else ""), flush=True)
    return 1 if problems else 0
