"""Which torch `make` installs on a machine without a GPU: the CPU build where pip's index has one, else the index's own.

Prints a pip constraint. The index's own torch may bring CUDA with it: its size and how to avoid it are said before it downloads.
All of it is asked of plain pip, and so of the indexes that it is configured with.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import Request, urlopen

PINNED = re.findall(r"^torch==([\d.]+)", (Path(__file__).parent / "cpu.txt").read_text(), re.MULTILINE)[0]
ADVICE = """Without a GPU, a CPU build of about 200 MB does the same. To take one, stop here (Ctrl-C), run `make clean`, set
PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (the address is on its "Get started" page) and run make again."""


def main() -> int:
    """Print the constraint on standard output, all else on standard error."""
    versions = available()
    if not versions:
        say("pip finds no torch for this Python and platform: expected 2.13 or later; check pip's index, or set PYTHON")
        return 1
    version = choose(versions)
    if sys.platform == "linux" and not version.endswith("+cpu"):
        say(
            f"pip's index has no CPU build of torch: taking its torch {version}.\n{ADVICE}\nAdding up what pip will download ..."
        )
        say(f"To download: {summary(sizes(version))}.")
    print(f"torch=={version}")
    return 0


def available() -> list[str]:
    """Versions of torch for this Python and platform, newest first."""
    listing = pip("index", "versions", "torch")
    found = re.search(r"^Available versions: (.+)$", listing.stdout, re.MULTILINE)
    if not found:
        say(listing.stderr)
    return found[1].split(", ") if found else []


def choose(versions: list[str]) -> str:
    """The pinned CPU build, else the newest CPU build, else the pinned version, else the newest."""
    builds = [version for version in versions if version.endswith("+cpu")] or versions
    return next((version for version in builds if version.removesuffix("+cpu") == PINNED), builds[0])


def sizes(version: str) -> dict[str, int | None]:
    """Package → bytes of everything that torch of this version installs, largest first; None where the index does not tell."""
    # Earlier ones download all wheels in a dry run.
    pip("install", "--upgrade", "--quiet", "pip>=25.3")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip("install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report), f"torch=={version}")
        installed = json.loads(report.read_text())["install"] if report.exists() else []
    found = {entry["metadata"]["name"]: size(entry["download_info"]["url"]) for entry in installed}
    return dict(sorted(found.items(), key=lambda item: -(item[1] or 0)))


def size(url: str) -> int | None:
    """Bytes of the file at a URL, without downloading it; None where that is not told."""
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    try:
        with urlopen(Request(url, method="HEAD"), timeout=30, context=context) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError):
        return None


def summary(sizes: dict[str, int | None]) -> str:
    """Packages and megabytes in one line."""
    known = {name: count for name, count in sizes.items() if count is not None}
    if not known:
        return "pip cannot tell the megabytes beforehand; with CUDA they are thousands"
    largest = ", ".join(f"{name} {count / 1e6:,.1f} MB" for name, count in list(known.items())[:5])
    unknown = f" and {len(sizes) - len(known)} of unknown size" if len(known) < len(sizes) else ""
    return f"{len(known)} packages of {sum(known.values()) / 1e6:,.1f} MB{unknown}; the largest are {largest}"


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this environment's pip."""
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)


def say(text: str) -> None:
    """Print a message beside the constraint."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
