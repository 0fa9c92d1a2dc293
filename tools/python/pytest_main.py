# SPDX-License-Identifier: Apache-2.0
"""Runs pytest on one file the way Bazel expects a test to behave: see moe_py_test."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Generator

import pytest

REQUIRE_GPU = os.environ.get("MOE_REQUIRE_GPU") == "1"


def why_no_gpu() -> str:
    """Returns why no test can use a GPU here, or the empty string if tests can."""
    import torch  # only here: a test without GPU cases decides for itself when to pay for it

    return "" if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False"


class BazelPlugin:
    """Sharding, and the rule for cases that need a GPU."""

    def pytest_configure(self, config: pytest.Config) -> None:
        """Registers the `gpu` marker."""
        config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keeps this shard's cases; skips those marked `gpu` where PyTorch sees no GPU."""
        shards = int(os.environ.get("TEST_TOTAL_SHARDS", "1"))
        if shards > 1:
            pathlib.Path(os.environ["TEST_SHARD_STATUS_FILE"]).touch()
            mine = int(os.environ["TEST_SHARD_INDEX"])
            others = [item for index, item in enumerate(items) if index % shards != mine]
            config.hook.pytest_deselected(items=others)
            items[:] = items[mine::shards]
        marked = [item for item in items if item.get_closest_marker("gpu") is not None]
        if marked and (reason := why_no_gpu()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, object, None]:
        """Makes a skip for want of a GPU a failure where MOE_REQUIRE_GPU=1 demands one."""
        outcome = yield
        report = outcome.get_result()  # type: ignore[attr-defined]
        if not (REQUIRE_GPU and report.skipped) or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        if item.get_closest_marker("gpu") is not None or "GPU" in str(reason):
            report.outcome = "failed"
            report.longrepr = f"MOE_REQUIRE_GPU=1, yet {reason}"


def main() -> int:
    """Runs pytest with Bazel's filter, shard and report file."""
    arguments = ["-q", "-ra", "--color=no", "-p", "no:cacheprovider", "--import-mode=importlib"]
    arguments += ["-o", "junit_family=xunit2", "-o", "junit_logging=no"]
    if report := os.environ.get("XML_OUTPUT_FILE"):
        arguments += ["--junitxml", report]
    if expression := os.environ.get("TESTBRIDGE_TEST_ONLY"):
        arguments += ["-k", expression]
    status = pytest.main([*arguments, *sys.argv[1:]], plugins=[BazelPlugin()])
    sharded = int(os.environ.get("TEST_TOTAL_SHARDS", "1")) > 1
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and sharded:
        return 0  # more shards than cases
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
