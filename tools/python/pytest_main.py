# SPDX-License-Identifier: Apache-2.0
"""Runs pytest on one file the way Bazel expects a test to behave: see moe_py_test."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Generator

import pytest

REQUIRE_GPU = os.environ.get("MOE_REQUIRE_GPU") == "1"
SHARDS = int(os.environ.get("TEST_TOTAL_SHARDS", "1"))


class BazelPlugin:
    """Sharding, and failures for want of a GPU where one is required."""

    def __init__(self) -> None:
        self.skipped_whole = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notes that a file skipped itself as a whole: it has no case that could be counted."""
        if report.skipped:
            self.skipped_whole = not (REQUIRE_GPU and "GPU" in str(report.longrepr))

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keeps this shard's cases."""
        if SHARDS == 1:
            return
        pathlib.Path(os.environ["TEST_SHARD_STATUS_FILE"]).touch()
        mine = int(os.environ["TEST_SHARD_INDEX"])
        others = [item for index, item in enumerate(items) if index % SHARDS != mine]
        config.hook.pytest_deselected(items=others)
        items[:] = items[mine::SHARDS]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, object, None]:
        """Makes a skip that names a GPU as its reason a failure where MOE_REQUIRE_GPU=1."""
        outcome = yield
        report = outcome.get_result()  # type: ignore[attr-defined]
        if not (REQUIRE_GPU and report.skipped) or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        if "GPU" in str(reason):
            report.outcome = "failed"
            report.longrepr = f"MOE_REQUIRE_GPU=1, yet {reason}"


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU."""
    import torch  # only here: a test without GPU cases decides for itself when to pay for it

    return torch.cuda.is_available()


def main() -> int:
    """Runs pytest with Bazel's filter, shard and report file."""
    own = sys.argv[1:]
    if "--gpu" in own:
        own.remove("--gpu")
        if REQUIRE_GPU and not has_gpu():  # said once, not for each of a thousand cases
            print("MOE_REQUIRE_GPU=1 (--config=gpu), yet torch.cuda.is_available() is False")
            return 1
    if folder := os.environ.get("TEST_TMPDIR"):
        # Compilers that PyTorch calls keep caches under HOME, which a sandbox leaves out.
        os.environ.setdefault("HOME", folder)
    arguments = ["-q", "-ra", "--color=no", "-p", "no:cacheprovider", "--import-mode=importlib"]
    arguments += ["-o", "junit_family=xunit2", "-o", "junit_logging=no"]
    if report := os.environ.get("XML_OUTPUT_FILE"):
        arguments += ["--junitxml", report]
    if expression := os.environ.get("TESTBRIDGE_TEST_ONLY"):
        arguments += ["-k", expression]
    plugin = BazelPlugin()
    status = pytest.main([*arguments, *own], plugins=[plugin])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and (SHARDS > 1 or plugin.skipped_whole):
        return 0  # more shards than cases, or a file that said why it skips itself
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
