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

from dpcomm.plan.constants import SHM
from dpcomm.plan.cpu import Carried, Gloo, Shm

ROOT = Path(__file__).resolve().parent.parent
CONSTANTS = ROOT / "dpcomm" / "plan" / "constants.py"
FIRST_STEP, LAST_STEP = 0.3, 0.004
DIGITS = 3  # that are kept of a constant
OVERLAPS = (1.0, 8.0)  # between none and, for the eye, perfect
# Where to begin; the outcome hardly depends on it.
FIRST_GLOO = Gloo(Carried(100, 500, 200), Carried(200, 500, 700), 100, 200, 500, 1.5, 2.5)
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
    return [*fitted.ours, *fitted.native, *fitted[2:]]


def packed(values: Sequence[float], like: Gloo | Shm) -> Gloo | Shm:
    """The other way round."""
    if isinstance(like, Shm):
        return Shm(*values)
    return Gloo(Carried(*values[:3]), Carried(*values[3:6]), *values[6:])


def fit(rows: Sequence[measured.Measured], first: Gloo | Shm, within: Shm = SHM) -> Gloo | Shm:
    """The constants that predict these rows best, to DIGITS digits. `within`: of engine shm, in two levels."""
    values = unpack(first)

    def cost(tried: list[float]) -> float:
        return measured.misfit(rows, packed(tried, first), within)

    return packed([rounded(value) for value in descended(values, cost, isinstance(first, Gloo))], first)


def descended(values: list[float], cost: Callable[[list[float]], float], bounded: bool) -> list[float]:
    """Where no single constant that is a step larger or smaller costs less, by Hooke and Jeeves' pattern search (1961):
    after each turn of all constants the same way is gone once more. `bounded`: the last is an overlap."""
    least, step = cost(values), FIRST_STEP

    def better(tried: list[float]) -> bool:
        nonlocal values, least
        if bounded and not OVERLAPS[0] <= tried[-1] <= OVERLAPS[1]:
            return False
        if (found := cost(tried)) >= least - 1e-9:
            return False
        values, least = tried, found
        return True

    while step > LAST_STEP:
        before = values
        for place in range(len(values)):
            for factor in (1 + step, 1 / (1 + step)):
                better([*values[:place], values[place] * factor, *values[place + 1 :]])
        if values == before:
            step /= 2
        else:
            better([now * now / then for now, then in zip(values, before, strict=True)])
    return values


def rounded(value: float) -> float:
    return 0.0 if value == 0 else round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))


def fitted() -> tuple[Gloo, Shm]:
    """From the results as they lie there."""
    shm = fit(measured.within_a_host(FITTED_WITHIN), FIRST_SHM)
    assert isinstance(shm, Shm)
    gloo = fit(measured.between_hosts(), FIRST_GLOO, shm)
    assert isinstance(gloo, Gloo)
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
