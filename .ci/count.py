# SPDX-License-Identifier: Apache-2.0
"""Sums the JUnit files below the given folders: `N passed, N failed, N skipped`.

    python3 .ci/count.py FAILED_STEPS FOLDER ...

FAILED_STEPS, the number of CI's steps that failed, counts where no test case tells of it. Exit
status 1 if anything failed or no test ran.
"""

from __future__ import annotations

import pathlib
import sys
import xml.etree.ElementTree as ElementTree


def count(folder: pathlib.Path) -> tuple[int, int, int]:
    """Returns how many test cases below `folder` passed, failed and were skipped."""
    passed = failed = skipped = 0
    for report in folder.rglob("test.xml"):
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failed += 1
            elif case.find("skipped") is not None:
                skipped += 1
            else:
                passed += 1
    return passed, failed, skipped


def main() -> int:
    """Prints the line and returns the exit status."""
    failed_steps = int(sys.argv[1])
    counts = [count(pathlib.Path(folder).resolve()) for folder in sys.argv[2:] if folder]
    passed, failed, skipped = (sum(column) for column in zip((0, 0, 0), *counts, strict=True))
    failed = max(failed, failed_steps)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
