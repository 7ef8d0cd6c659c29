"""dpcomm beside stock NCCL, with the flags and columns of nccl-tests.

    torchrun --nproc-per-node N benchmarks/nccl.py      a GPU for each process, on any number of hosts
    python benchmarks/nccl.py                           one GPU: virtual ranks, which says nothing of links
    ... --device cpu                                    a rehearsal without GPUs, with gloo in NCCL's place

Exit status: 0, 1 where an element was wrong, 2 where it could not run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from allreduce import why_not_importable


def main(argv: Sequence[str]) -> int:
    if problem := why_not_importable("dpcomm"):
        print(f"dpcomm is not built for this Python ({problem}): run `make venv`", file=sys.stderr)
        return 2
    import nccl_plan  # these import dpcomm
    import nccl_rank
    from gpu_environment import why_no_gpu

    arguments = nccl_plan.parse_arguments(argv)
    if arguments.device == "cuda" and (reason := why_no_gpu()):
        print(f"nccl: there is no GPU here ({reason}). --device cpu rehearses without one.", file=sys.stderr)
        return 2
    wrong = nccl_rank.run(arguments)
    if wrong:
        print(f"{wrong} elements were wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
