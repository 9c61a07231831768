"""No object file that is compiled for an instruction set of its own defines a symbol that the linker
may also use elsewhere (an inline function or a template that was not inlined): on a processor without
that instruction set the program would die in it.

usage: isa_objects_test.py OBJECT...
"""

import re
import subprocess
import sys

OWN = re.compile(r"headroom::kernels::cpu::(avx|amx)")


def main():
    shared = []
    for path in sys.argv[1:]:
        lines = subprocess.run(["nm", "-C", "--defined-only", path], check=True,
                               capture_output=True, text=True).stdout.splitlines()
        # W, V: weak; u: unique global. Each is one definition for the whole program; what names the
        # instruction set's own namespace is used by it alone.
        shared += [f"{path}: {line}" for line in lines
                   if line.split()[1] in "WVuwv" and not OWN.search(line)]
    print("\n".join(shared) if shared else f"{len(sys.argv) - 1} objects define nothing shared")
    return 1 if shared or len(sys.argv) < 2 else 0


if __name__ == "__main__":
    sys.exit(main())
