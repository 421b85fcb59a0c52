"""What accelerate asks for and does not start, told from its command and its environment."""

from __future__ import annotations

import pytest

from hfcompress.utils.launch import lacks_processes, parse_num_processes

ANNOUNCED = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("accelerate launch --cpu --num_processes 2 scripts/distill.py r.yaml", 2),
        ("accelerate launch --cpu --num-processes=4 scripts/distill.py r.yaml", 4),
        ("accelerate launch --cpu scripts/distill.py r.yaml", None),
        ("accelerate launch --cpu --num_machines 2 --num_processes 4 scripts/distill.py r.yaml", None),
        ("accelerate launch --cpu --num_processes many scripts/distill.py", None),
        ("accelerate launch --cpu --num_processes", None),
        ("", None),
    ],
)
def test_the_number_of_processes_is_read_from_the_command(command: str, expected: int | None) -> None:
    assert parse_num_processes(command.split()) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (ANNOUNCED, True),
        ({}, False),
        (ANNOUNCED | {"WORLD_SIZE": "2"}, False),
        (ANNOUNCED | {"PMI_SIZE": "2"}, False),
        (ANNOUNCED | {"ACCELERATE_USE_CPU": "False"}, False),
        ({"ACCELERATE_USE_CPU": "True"}, False),
    ],
)
def test_a_process_is_left_alone_where_others_were_announced_and_nobody_started_them(
    environment: dict[str, str], expected: bool
) -> None:
    assert lacks_processes(environment) is expected
