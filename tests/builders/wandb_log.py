"""Reads what wandb writes for a run that stays on this machine."""

from __future__ import annotations

from pathlib import Path


def records(file: Path) -> list:
    """The messages in a file of wandb: a LevelDB log, whose records are split where a block of 32 KiB ends."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, found, part = file.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found
