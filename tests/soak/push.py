"""`push` against a Hub that fails in every way, at every request: `python -m tests.soak.push`.

Each case is right where the command ends in time, with exit status 2 and one error, without a traceback, without the
token, and with nothing committed; or with 0 and everything committed, where the client may try again.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from tests import loopback_hub
from tests.loopback_hub import FAULTS, LoopbackHub

TOKEN = "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"
REPO = "user/tiny"
PLACES = {
    "create": "POST /api/repos/create",
    "card": "POST /api/validate-yaml",
    "preupload": "POST .*/preupload/",
    "batch": "POST .*/info/lfs/objects/batch",
    "upload": "PUT /lfs/",
    "verify": "POST /lfs/",
    "commit": "POST .*/commit/",
    "everything": "",
}
"""The requests of a push, by what they are for."""
HARMLESS = {
    *itertools.product(["create"], ["conflict without a word"]),  # a repository that is there already
    *itertools.product(["card"], ["an empty object", "conflict without a word"]),
    *itertools.product(["upload"], ["html", "an empty object", "a list", "a number", "bytes"]),  # the status counts
    *itertools.product(["verify"], ["html", "an empty object", "a list", "a number", "bytes"]),
}
"""Answers that a client may take for success, place by place."""
SECONDS = 20
"""What a case may take: a limit of half a second for the Hub, and the work around it."""
CARD = """---
license: apache-2.0
language: en
---

# tiny

path = "PATH_OR_REPO"
"""


def finished_run(folder: Path) -> Path:
    """A directory that looks like a finished run to `push`."""
    final = folder / "tiny-half" / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}")
    (final / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (final / "README.md").write_text(CARD)
    return final.parent


@contextmanager
def pointed_at(url: str) -> Iterator[None]:
    """Makes this process's clients ask a Hub, wait half a second for it, and never sleep between attempts."""
    from huggingface_hub import constants

    environment = {"HF_TOKEN": TOKEN, "HFCOMPRESS_HUB_TIMEOUT": "0.5", "NO_PROXY": "*"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(constants, "ENDPOINT", url),
        mock.patch.object(constants, "HF_HUB_OFFLINE", False),
        mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),
        mock.patch("time.sleep"),
    ):
        yield


def call(*arguments: str) -> tuple[int, str]:
    """The command line in this process: its exit status, and everything that it printed."""
    from hfcompress import cli
    from hfcompress.utils import logging as console

    text = io.StringIO()
    console.out.cache_clear()
    console.err.cache_clear()
    with mock.patch.object(sys, "argv", ["hfcompress", *arguments]), redirect_stdout(text), redirect_stderr(text):
        try:
            cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException as error:
            return 1, f"{text.getvalue()}\nTraceback: {error!r}"
    return status, text.getvalue()


def wrongs(run: Path, hub: LoopbackHub, elsewhere: LoopbackHub, place: str, fault: str) -> list[str]:
    """What is not as it should be when a push meets a fault; nothing where all is."""
    hub.elsewhere = elsewhere.url
    hub.faults = {PLACES[place]: fault}
    start = time.monotonic()
    status, printed = call("push", str(run), "--repo", REPO)
    seconds = time.monotonic() - start
    repo = hub.repositories.get(("model", REPO))
    commits = len(repo.commits) if repo else 0
    refused = status == 2 and f"\n{printed}".count("\nerror: ") == 1 and commits == 0
    done = status == 0 and commits == 1 and (place, fault) in HARMLESS
    checks = {
        f"status {status}, {commits} commits, said: {printed[-400:]!r}": refused or done,
        f"took {seconds:.1f} s": seconds < SECONDS,
        "a traceback": "Traceback" not in printed,
        "the token was printed": TOKEN not in printed,
        "control characters were printed": not set("\x1b\x07\r\u202e") & set(printed),
        f"{len(printed)} characters were printed": len(printed) < 3000,
        "the token went elsewhere": not [r for r in elsewhere.requests if TOKEN in str(r.headers)],
    }
    return [what for what, right in checks.items() if not right]


def cases() -> list[tuple[str, str]]:
    """Each place with each fault."""
    return list(itertools.product(PLACES, FAULTS))


def try_case(run: Path, place: str, fault: str) -> list[str]:
    """`wrongs` of one case, with a Hub of its own."""
    with loopback_hub.running() as hub, loopback_hub.running() as elsewhere, pointed_at(hub.url):
        hub.token = TOKEN
        return wrongs(run, hub, elsewhere, place, fault)


def main() -> int:
    """Tries every case and prints how many ended as they should."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        run = finished_run(Path(folder))
        for place, fault in cases():
            if found := try_case(run, place, fault):
                failed += 1
                print(json.dumps({"place": place, "fault": fault, "wrong": found}), file=sys.stderr)
    tried = len(cases())
    print(f"push faults: tried {tried}, as it should {tried - failed}, not {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
