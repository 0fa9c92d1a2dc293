# SPDX-License-Identifier: Apache-2.0
"""Sums the JUnit files below the given folders: `N passed, N failed, N skipped`.

    python3 .ci/count.py FAILED_STEPS FOLDER ...

Before it, how many cases were skipped for each reason. FAILED_STEPS, the number of CI's steps that
failed, counts where no test case tells of it. Exit status 1 if anything failed or no test ran.
"""

from __future__ import annotations

import collections
import pathlib
import re
import sys
import xml.etree.ElementTree as ElementTree


def reason(skipped: ElementTree.Element) -> str:
    """Returns why a case was skipped; of a file skipped whole pytest gives (path, line, why)."""
    whole = re.search(r"'Skipped: (.*)'\)$", skipped.text or "")
    if skipped.get("message") == "collection skipped" and whole:
        return f"a whole file: {whole[1]}"
    return skipped.get("message") or "no reason given"


def count(folder: pathlib.Path) -> tuple[int, int, collections.Counter[str]]:
    """Returns how many cases below `folder` passed and failed, and were skipped by reason."""
    passed = failed = 0
    skipped: collections.Counter[str] = collections.Counter()
    for report in folder.rglob("test.xml"):
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            skip = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                failed += 1
            elif skip is not None:
                skipped[reason(skip)] += 1
            else:
                passed += 1
    return passed, failed, skipped


def main() -> int:
    """Prints the reasons and the line, and returns the exit status."""
    passed, failed = 0, 0
    skipped: collections.Counter[str] = collections.Counter()
    for folder in filter(None, sys.argv[2:]):
        counts = count(pathlib.Path(folder).resolve())
        passed, failed = passed + counts[0], failed + counts[1]
        skipped += counts[2]
    failed = max(failed, int(sys.argv[1]))
    for why, cases in skipped.most_common():
        print(f"skipped {cases}: {why}")
    print(f"{passed} passed, {failed} failed, {skipped.total()} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
