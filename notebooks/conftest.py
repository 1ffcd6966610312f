"""What nbval leaves out: figures, cells that escape it, and the time taken."""

import base64
import io

import numpy as np
import psutil
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile
from PIL import Image

COMPARED = pytest.StashKey[int]()
DIFFERENT = 32  # of 255 levels: what anti-aliasing may change
TOLERATED = 5  # pixels that may be different: fewer than a changed digit has
LONGEST = {"09_training_and_translation": 120}  # seconds; 60 for others

collect, compare = IPyNbFile.collect, IPyNbCell.compare_outputs


class EveryCellWasCompared(pytest.Item):
    """Stands behind the last cell: each cell was compared, within the time."""

    def runtest(self):
        total = sum(cell.cell_type == "code" for cell in self.parent.nb.cells)
        compared = self.parent.stash.get(COMPARED, 0)
        assert compared == total, f"{compared} of {total} cells were compared"
        assert total, "the notebook has no cell that runs"
        kernel = psutil.Process(self.parent.kernel.km.provisioner.pid)
        seconds = sum(kernel.cpu_times()[:2])
        self.user_properties.append(("processor seconds", seconds))
        longest = LONGEST.get(self.path.stem, 60)
        assert seconds < longest, f"{seconds:.0f} s of a core, over {longest}"

    def repr_failure(self, excinfo):
        return str(excinfo.value)


def collect_and_count(file):
    """Collect the cells as nbval does, and the count of them."""
    yield from collect(file)
    yield EveryCellWasCompared.from_parent(file, name="every cell was compared")


def compare_outputs_and_figures(cell, test, ref, skip_compare=None):
    """Compare what nbval compares, then the figures one by one."""
    stash = cell.parent.stash
    stash[COMPARED] = stash.get(COMPARED, 0) + 1
    if not compare(cell, test, ref, skip_compare):
        return False
    measured = "measured" in cell.cell.metadata.get("tags", [])
    found = difference(figures(test), figures(ref), only_count=measured)
    cell.comparison_traceback += found
    return not found


def difference(new, stored, only_count):
    """Say how figures differ; those of what a clock read are only counted."""
    if len(new) != len(stored):
        return [f"{len(stored)} figures stored, {len(new)} made"]
    for a, b in zip(new, stored, strict=True) if not only_count else ():
        if a.shape != b.shape:
            return [f"{b.shape[:2]} pixels stored, {a.shape[:2]} made"]
        count = (np.abs(a - b).max(-1) > DIFFERENT).sum()
        if count > TOLERATED:
            return [f"{count} pixels differ"]
    return []


def figures(outputs):
    """Decode the figures among the outputs into arrays of pixels."""
    data = [output.get("data", {}).get("image/png") for output in outputs]
    files = [io.BytesIO(base64.b64decode(png)) for png in data if png]
    return [np.asarray(Image.open(f).convert("RGB"), dtype=int) for f in files]


IPyNbFile.collect = collect_and_count
IPyNbCell.compare_outputs = compare_outputs_and_figures
