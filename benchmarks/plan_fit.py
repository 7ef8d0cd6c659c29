"""Fits the constants of `python -m dpcomm plan` to benchmarks/results and writes dpcomm/plan/constants.py:
`python benchmarks/plan_fit.py`. `--check` writes nothing and ends with 1 where they differ. plan_page.py comes next.

Every constant is found by turns: each in both directions by a step that halves. Nothing is random.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import plan_rows as measured

from dpcomm.plan.cpu import Carried, Gloo, Shm

ROOT = Path(__file__).resolve().parent.parent
CONSTANTS = ROOT / "dpcomm" / "plan" / "constants.py"
FIRST_STEP, LAST_STEP = 0.3, 0.002
DIGITS = 3  # that are kept of a constant
OVERLAPS = (1.0, 8.0)  # between none and, for the eye, perfect
# Where to begin; the outcome hardly depends on it.
FIRST_GLOO = Gloo(Carried(200, 100, 700, 300), Carried(300, 300, 700, 700), 2.0, 0.5)
FIRST_SHM = Shm(2.0, 0.5, 10, 15, 30, 10, 20, 1.0)
FITTED_WITHIN, TRIED_WITHIN = "python-*ranks.json", ("allreduce-*ranks.json", "rivals-*ranks.json")

HEAD = '''"""Constants of cpu.py, fitted to measurements. Written by `python benchmarks/plan_fit.py`; do not edit.

{origin}
"""

from dpcomm.plan.cpu import Carried, Gloo, Shm

'''


def unpack(fitted: Gloo | Shm) -> list[float]:
    """All constants in a row."""
    if isinstance(fitted, Shm):
        return [*fitted]
    return [*fitted.ours, *fitted.native, fitted.overlap, fitted.crowding]


def packed(values: Sequence[float], like: Gloo | Shm) -> Gloo | Shm:
    """The other way round."""
    if isinstance(like, Shm):
        return Shm(*values)
    return Gloo(Carried(*values[:4]), Carried(*values[4:8]), *values[8:])


def fit(rows: Sequence[measured.Measured], first: Gloo | Shm) -> Gloo | Shm:
    """The constants that predict these rows best, to DIGITS digits."""
    values = unpack(first)

    def cost(tried: list[float]) -> float:
        return measured.misfit(rows, packed(tried, first))

    return packed([rounded(value) for value in descended(values, cost, isinstance(first, Gloo))], first)


def descended(values: list[float], cost: Callable[[list[float]], float], bounded: bool) -> list[float]:
    """Where no single constant that is a step larger or smaller costs less. `bounded`: the last but one is an
    overlap."""
    least, step = cost(values), FIRST_STEP
    while step > LAST_STEP:
        moved = False
        for place in range(len(values)):
            for factor in (1 + step, 1 / (1 + step)):
                tried = [*values]
                tried[place] *= factor
                if bounded and not OVERLAPS[0] <= tried[-2] <= OVERLAPS[1]:
                    continue
                if (found := cost(tried)) < least - 1e-9:
                    values, least, moved = tried, found, True
        step = step if moved else step / 2
    return values


def rounded(value: float) -> float:
    return 0.0 if value == 0 else round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))


def fitted() -> tuple[Gloo, Shm]:
    """From the results as they lie there."""
    gloo, shm = fit(measured.between_hosts(), FIRST_GLOO), fit(measured.within_a_host(FITTED_WITHIN), FIRST_SHM)
    assert isinstance(gloo, Gloo)
    assert isinstance(shm, Shm)
    return gloo, shm


def source(gloo: Gloo, shm: Shm) -> str:
    """The text of constants.py."""
    between, within = measured.between_hosts(), measured.within_a_host(FITTED_WITHIN)
    bars = [measured.errors(rows, each).most_of for rows, each in ((between, gloo), (within, shm))]
    origin = "\n".join(
        f"{name}: {len(rows)} rows of benchmarks/results, {', '.join(sorted({row.file for row in rows}))}."
        for name, rows in (("GLOO", between), ("SHM", within))
    )
    lines = [f"GLOO = {text(gloo)}", f"SHM = {text(shm)}", "# Nine tenths of those rows are predicted to within this."]
    lines += [f"GLOO_ERROR = {bars[0]:.2f}", f"SHM_ERROR = {bars[1]:.2f}"]
    return HEAD.format(origin=origin) + "\n".join(lines) + "\n"


def text(fitted: object) -> str:
    """A named tuple as Python."""
    assert isinstance(fitted, tuple)
    fields = zip(type(fitted)._fields, fitted, strict=True)  # type: ignore[attr-defined]
    inner = [f"{name}={text(value) if isinstance(value, tuple) else f'{value:g}'}" for name, value in fields]
    if isinstance(fitted, Carried):
        return f"Carried({', '.join(inner)})"
    return f"{type(fitted).__name__}(\n" + "".join(f"    {line},\n" for line in inner) + ")"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the constants are others")
    arguments = parser.parse_args(argv)
    found = source(*fitted())
    if arguments.check:
        return int(CONSTANTS.read_text() != found)
    CONSTANTS.write_text(found)
    print(f"wrote {CONSTANTS.relative_to(ROOT)}; now `python benchmarks/plan_page.py`")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
