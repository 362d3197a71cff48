"""The ranks of one machine are reached from that machine alone."""

import os
import re
from pathlib import Path

import pytest

import launched

LOOPBACK = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")


def listening(pid):
    """The local addresses, in hexadecimal, at which a process listens."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))  # noqa: PTH115 - it names no path
        except FileNotFoundError:  # closed meanwhile
            continue
        sockets |= {found[1]} if found else set()
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()]
    return {row[1] for row in rows if row[3] == "0A" and row[9] in sockets}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's tables of sockets")
def test_store_and_links_listen_on_the_loopback_interface_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    launched.write_settings(training={"steps": 10**6})
    command = launched.Command("decoupled_pp", "train", "run.yaml", "--ranks=2")
    command.until(launched.checkpoint_steps)  # the links are connected
    places = {place for pid in command.processes() for place in listening(pid)}
    command.kill()
    assert len(places) >= 3  # the launcher's store, and a device of gloo in each rank
    assert [place for place in places if not place.startswith(LOOPBACK)] == []
