"""Write constraints.txt from pip's own resolutions, one for Python 3.10 and one for a newer Python.

Make each resolution on its Python, in a fresh environment, then put them together:

    python3.10 -m pip install --dry-run --ignore-installed --report old.json -e ".[dev,docs,issues,onnx,tabular,tracking]"
    python3.11 -m pip install --dry-run --ignore-installed --report new.json -e ".[dev,docs,issues,onnx,tabular,tracking]"
    python scripts/build_constraints.py old.json new.json > constraints.txt

The newer one is made on Python 3.11, whose newest packages also exist for 3.12 and 3.13. Packages that torch pins itself
(CUDA, triton) are left out: they differ between platforms, and torch's own pins are exact.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")
HEADER = """\
# Exact versions for ./scripts/test, ./scripts/demo: pip install -c constraints.txt -e ".[dev,docs,issues,onnx,tabular,tracking]"
# Written by scripts/build_constraints.py, which says how. CUDA packages are absent: torch pins its own.
"""


def versions(report: Path) -> dict[str, str]:
    """Return version by normalised name from a pip report, local version suffixes (+cu132) removed."""
    found = {}
    for entry in json.loads(report.read_text(encoding="utf-8"))["install"]:
        name = re.sub(r"[-_.]+", "-", entry["metadata"]["name"]).lower()
        if not name.startswith(PINNED_BY_TORCH) and name != "flyp-saflex":
            found[name] = entry["metadata"]["version"].partition("+")[0]
    return found


def main(old: Path, new: Path) -> None:
    """Print one line per package, or two with markers where the Pythons differ."""
    on_310, on_311 = versions(old), versions(new)
    print(HEADER, end="")
    for name in sorted(on_310 | on_311):
        a, b = on_310.get(name), on_311.get(name)
        if a == b:
            print(f"{name}=={a}")
            continue
        if a:
            print(f'{name}=={a}; python_version < "3.11"')
        if b:
            print(f'{name}=={b}; python_version >= "3.11"')


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
