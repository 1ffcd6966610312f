"""What nbval leaves out: figures are compared, no cell escapes, no chapter takes too long."""

import base64
import io

import numpy as np
import psutil
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile
from PIL import Image

COMPARED = pytest.StashKey[int]()
DIFFERENT = 32  # of 255 levels: what anti-aliasing may change
TOLERATED = 0.001  # share of the pixels that may be different
LONGEST = 60  # seconds of one core for a chapter

collect, compare_outputs = IPyNbFile.collect, IPyNbCell.compare_outputs


class EveryCellWasCompared(pytest.Item):
    """Stands behind the last cell; fails if a cell was not compared or the time is exceeded."""

    def runtest(self):
        total = sum(cell.cell_type == "code" for cell in self.parent.nb.cells)
        compared = self.parent.stash.get(COMPARED, 0)
        assert compared == total, f"{compared} of {total} cells were compared"
        assert total, "the notebook has no cell that runs"
        used = psutil.Process(self.parent.kernel.km.provisioner.pid).cpu_times()
        seconds = used.user + used.system
        assert seconds < LONGEST, f"{seconds:.0f} s of one core; at most {LONGEST} are allowed"

    def repr_failure(self, excinfo):
        return str(excinfo.value)


def collect_and_count(file):
    """Collect the cells as nbval does, and the count of them."""
    yield from collect(file)
    yield EveryCellWasCompared.from_parent(file, name="every cell was compared")


def compare_outputs_and_figures(cell, test, ref, skip_compare=None):
    """Compare what nbval compares, then the figures one by one."""
    cell.parent.stash[COMPARED] = cell.parent.stash.get(COMPARED, 0) + 1
    if not compare_outputs(cell, test, ref, skip_compare):
        return False
    new, stored = figures(test), figures(ref)
    if len(new) != len(stored):
        cell.comparison_traceback.append(f"{len(stored)} figures stored, {len(new)} made")
        return False
    if "measured" in cell.cell.metadata.get("tags", []):  # the figure shows a clock's readings
        return True
    for number, (a, b) in enumerate(zip(new, stored, strict=True), 1):
        if a.shape != b.shape:
            cell.comparison_traceback.append(f"figure {number}: {b.shape} stored, {a.shape} made")
            return False
        share = (np.abs(a - b).max(-1) > DIFFERENT).mean()
        if share > TOLERATED:
            cell.comparison_traceback.append(f"figure {number}: {share:.2%} of the pixels differ")
            return False
    return True


def figures(outputs):
    """Decode the figures among the outputs into arrays of pixels."""
    data = [output.get("data", {}).get("image/png") for output in outputs]
    images = [Image.open(io.BytesIO(base64.b64decode(png))) for png in data if png]
    return [np.asarray(image.convert("RGB"), dtype=int) for image in images]


IPyNbFile.collect, IPyNbCell.compare_outputs = collect_and_count, compare_outputs_and_figures
