"""The quick half of the fuzzing of data files; `python -m tests.soak.data` is the other."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from tests import fuzz_data

QUICK = settings(max_examples=200, derandomize=True, deadline=None, database=None,
                 suppress_health_check=list(HealthCheck))  # fmt: skip


@QUICK
@given(fuzz_data.files())
def test_a_file_is_read_exactly_or_refused(made: fuzz_data.Made) -> None:
    assert fuzz_data.fault_of(made) == ""
