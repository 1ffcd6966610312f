"""Compile Triton kernels for a Hopper GPU, which need not be there, and print what came out.

Reads a list of ``[module, kernel, signature, constants, options]`` as JSON from standard input,
where ``:16`` after a type says that 16 divides its values. Prints one line of JSON for each: which
instructions it uses, its shared memory in bytes, and the bytes that spilled from its registers.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiled(module, kernel, signature, constants, options):
    """Compile one kernel and look at it."""
    function = getattr(import_module(f"tfm_ref.{module}"), kernel)
    names = function.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].endswith(":16")]
    types = {name: kind.removesuffix(":16") for name, kind in types.items()}
    used = {name: value for name, value in constants.items() if name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(function, types, constexprs=used, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "wgmma": "wgmma.mma_async" in result.asm["ptx"],
        "tma": "cp.async.bulk.tensor" in result.asm["ptx"],
        "shared": result.metadata.shared,
        "spilled": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
    }


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        print(json.dumps(compiled(*case)), flush=True)
