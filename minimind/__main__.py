"""`python -m minimind`: the `minimind` command where the package is not installed."""

from minimind.cli import run

if __name__ == "__main__":
    run()
