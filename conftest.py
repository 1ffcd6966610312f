"""Leave the kernels out where Triton, which is for Linux alone, is not installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["tfm_ref/*_kernels.py"]
