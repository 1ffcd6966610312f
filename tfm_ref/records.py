"""Records: what was measured, where, and by which code, so that it can be judged later."""

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

import torch

from tfm_ref.validation import check_size


def digest(modules: Iterable[str]) -> str:
    """Give a number that changes with the sources of modules.

    Args:
        modules: their names, such as "tfm_ref.attention".

    Returns:
        SHA-256 over the sources, in the order of the names.

    Raises:
        ValueError: if there are none.
    """
    names = sorted(set(modules))
    check_size("the number of modules", len(names))
    # They are read, not imported: a kernel's module needs a package that a reader may lack.
    sources = "".join(Path(find_spec(name).origin).read_text("utf-8") for name in names)
    return sha256(sources.encode()).hexdigest()


def surroundings(device: torch.device | str) -> dict[str, str]:
    """Say where and with what something is measured.

    Args:
        device: where it is computed.

    Returns:
        The device, the versions of all that drives it, and the time.

    Example:
        >>> surroundings("cpu")["torch"] == torch.__version__
        True
    """
    device = torch.device(device)
    found = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(
                query, capture_output=True, text=True, check=True
            ).stdout.split()[0]
        if find_spec("triton"):
            found["triton"] = import_module("triton").__version__
    return found


def new_record(
    name: str, values: Mapping[str, object], *, device: torch.device | str, modules: Iterable[str]
) -> dict[str, object]:
    """Put beside what was measured all that it takes to judge it later.

    Args:
        name: of the record.
        values: what was measured, for JSON, with the settings that it depends on.
        device: where it was measured.
        modules: whose code was measured.

    Returns:
        "name", "where" (:func:`surroundings`), "code" (modules and their digest) and "values".
    """
    modules = sorted(set(modules))
    code = {"modules": modules, "sha256": digest(modules)}
    return {"name": name, "where": surroundings(device), "code": code, "values": values}


def save_record(record: Mapping[str, object], folder: str | PathLike[str]) -> Path:
    """Write a record into a folder; an older one of its name is replaced.

    Args:
        record: made by :func:`new_record`.
        folder: where to.

    Returns:
        The path of the file.
    """
    path = Path(folder) / f"{record['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, allow_nan=False)
    # A list of numbers stays in one line; between brackets no string holds a line break.
    text = re.sub(r"\[[^][{}]*]", lambda found: re.sub(r"\n *", " ", found[0]), text)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def load_record(name: str, folder: str | PathLike[str] | None = None) -> dict | None:
    """Read what was measured, if it was.

    Args:
        name: of the record.
        folder: where it lies; the results that come with this package if not given.

    Returns:
        The record, with "is_current": whether the code that was measured is the code of today.
        None if there is no such record.

    Example:
        >>> load_record("what nobody has measured") is None
        True
    """
    folder = files("tfm_ref") / "results" if folder is None else Path(folder)
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    code = record["code"]
    are_there = all(map(find_spec, code["modules"]))
    return record | {"is_current": are_there and digest(code["modules"]) == code["sha256"]}


def overlay(name: str, own: Mapping[str, object] | None = None) -> dict[str, Mapping[str, object]]:
    """Lay a reader's own run over the recorded one, so that a plot shows both.

    Args:
        name: of the record.
        own: the reader's, made by :func:`new_record`; none if not given.

    Returns:
        The records there are, by what a legend says of them: none, one or both.

    Example:
        >>> overlay("what nobody has measured")
        {}
    """
    found = {}
    if (recorded := load_record(name)) is not None:
        where = recorded["where"]
        found[f"{where['device']}, {where['date'][:10]}"] = recorded
    if own is not None:
        found["your machine"] = own
    return found
