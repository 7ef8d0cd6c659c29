"""Plants one bug at a time into a copy of csrc/core and asks tests/cpp/core_probe.cpp whether it notices.

    python tests/mutants.py     prints a table

A replacement that does not match as often as it says is an error: the code has moved on and the mutant must follow.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cpp_build

PROBE = "tests/cpp/core_probe.cpp"
FOLDER = cpp_build.FOLDER / "mutants"
LANES = {"plain": "2", "tsan": "3"}


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in a file of csrc/core; the run of that kind must fail."""

    name: str
    kind: str  # plain: the bits are wrong; tsan: they may be right, on this processor, this time
    file: str = ""
    old: str = ""
    new: str = ""
    times: int = 1


CONTROLS = [Mutant("control", "plain"), Mutant("control", "tsan")]
MUTANTS = [
    # ---- memory order and credits: only a race detector is sure to see them
    Mutant(
        "relaxed_release",
        "tsan",
        "portable.h",
        "__atomic_store_n(flag, value, __ATOMIC_RELEASE);",
        "__atomic_store_n(flag, value, __ATOMIC_RELAXED);",
    ),
    Mutant(
        "relaxed_acquire",
        "tsan",
        "portable.h",
        "return __atomic_load_n(flag, __ATOMIC_ACQUIRE);",
        "return __atomic_load_n(flag, __ATOMIC_RELAXED);",
    ),
    Mutant(
        "post_before_the_lanes_arrive",
        "tsan",
        "protocol.h",
        "  lanes.sync(true);\n  for (int r = lanes.index(); r < t.nranks; r += lanes.count())\n"
        "    if (r != t.rank) lanes.post(",
        "  for (int r = lanes.index(); r < t.nranks; r += lanes.count())\n    if (r != t.rank) lanes.post(",
    ),
    Mutant(
        "two_slots",
        "tsan",
        "protocol.h",
        "number & uint32_t(t.slots - 1)",
        "number & uint32_t(t.slots / 2 - 1)",
    ),
    Mutant(
        "one_header_page",
        "tsan",
        "protocol.h",
        "const int page = int(t.box[t.rank]->sent[kHeader] % 2);",
        "const int page = 0;",
        times=2,
    ),
    Mutant(
        "take_without_waiting",
        "tsan",
        "direct.h",
        "if (!wait_peers(lanes, t, kResult, number + 1)) return false;",
        "if (load_acquire(t.failure) != 0) return false;",
    ),
    Mutant("ring_without_credits", "tsan", "ring.h", "if (sends && !wait_for_room()) return false;", ""),
    Mutant(
        "ring_does_not_wait_for_messages",
        "tsan",
        "ring.h",
        "if (turn > 0 && !wait_for_message()) return false;",
        "if (load_acquire(t.failure) != 0) return false;",
    ),
    # ---- the protocol
    Mutant(
        "flags_compare_without_wrap",
        "tsan",
        "protocol.h",
        "static_cast<int32_t>(flag - value) >= 0",
        "flag >= value",
    ),
    Mutant(
        "counters_forget_results",
        "plain",
        "protocol.h",
        "sent[kResult] += call.results;",
        "sent[kResult] += call.results & 0;",
    ),
    Mutant(
        "headers_are_not_compared",
        "plain",
        "protocol.h",
        "if (field == Field::none) continue;",
        "if (field == Field::none || t.nranks > 0) continue;",
    ),
    Mutant(
        "memory_is_written_before_headers_are_compared",
        "plain",
        "direct.h",
        "if (c == 1 && !agree(lanes, t, header)) return false;  // nothing has been written to user memory yet\n"
        "      if (!d.arrived(c - 1)) return false;\n      d.reduce(c - 1);",
        "if (!d.arrived(c - 1)) return false;\n      d.reduce(c - 1);\n"
        "      if (c == 1 && !agree(lanes, t, header)) return false;",
    ),
    Mutant(
        "ring_writes_memory_before_headers_are_compared",
        "plain",
        "ring.h",
        "first == 0 && turn == 1 &&",
        "first == 0 && turn == t.nranks &&",
    ),
    Mutant("last_cause_wins", "plain", "portable.h", "uint64_t expected = 0;", "uint64_t expected = *word;"),
    # ---- the bits
    Mutant(
        "owner_keeps_its_undecoded_sum",
        "plain",
        "direct.h",
        "memory.set(i, Codec::decode(scale, codes));",
        "memory.set(i, values(i));",
    ),
    Mutant(
        "oneshot_skips_the_last_encode",
        "plain",
        "oneshot.h",
        "memory.set(i, rounded(i));",
        "memory.set(i, total(i));",
    ),
    Mutant(
        "own_contribution_is_not_encoded",
        "plain",
        "tile.h",
        "const int own = Codec::scaled ? -1 : t.rank;",
        "const int own = t.rank;",
    ),
    Mutant(
        "added_in_another_order",
        "plain",
        "tile.h",
        "for (int r = 1; r < t.nranks; ++r) {",
        "for (int r = t.nranks - 1; r > 0; --r) {",
    ),
    Mutant(
        "wrong_chunk",
        "plain",
        "direct.h",
        "chunks.range(slice, owner);\n      put<Codec>",
        "chunks.range(slice, t.rank);\n      put<Codec>",
    ),
    Mutant(
        "ring_starts_at_another_rank",
        "plain",
        "ring.h",
        "(t.rank - turn + 2 * t.nranks)",
        "(t.rank - turn + 1 + 2 * t.nranks)",
    ),
    Mutant(
        "ring_divides_at_every_hop",
        "plain",
        "ring.h",
        "if constexpr (last) total.finish(op, nranks);",
        "total.finish(op, nranks);",
    ),
    Mutant(
        "ring_owner_keeps_its_undecoded_sum",
        "plain",
        "ring.h",
        "memory.set(i, adopted(i));",
        "memory.set(i, total(i));",
    ),
    Mutant(
        "ring_forwards_codes_without_exponents",
        "plain",
        "ring.h",
        "*out.exponent(at) = *in.exponent(at);",
        "*out.exponent(at) = 0;",
    ),
    Mutant(
        "tail_is_not_zero",
        "plain",
        "tile.h",
        "memset(padded + unit.count, 0, ",
        "memset(padded + unit.count, 0x7b, ",
    ),
    Mutant("exponent_off_by_one", "plain", "codec_fp16.h", "127 + 14 - (top >> 23)", "127 + 13 - (top >> 23)"),
    Mutant("exponent_of_another_group", "plain", "protocol.h", "+ at / kGroup;", "+ at / kGroup / 2;"),
    Mutant(
        "nan_loses_to_numbers",
        "plain",
        "element.h",
        "return x != x ? x : y != y ? y : order(x) < order(y) ? x : y;",
        "return y != y ? x : x != x ? y : order(x) < order(y) ? x : y;",
    ),
]


def plant(mutant: Mutant, root: Path) -> None:
    """Copies the core and its probe to root, with the bug in it.

    Raises:
        ValueError: the text to replace is not there as often as the mutant says.
    """
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(cpp_build.ROOT / "csrc" / "core", root / "csrc" / "core")
    shutil.copytree(cpp_build.ROOT / "tests" / "cpp", root / "tests" / "cpp", ignore=shutil.ignore_patterns("test_*"))
    if not mutant.file:
        return
    path = root / "csrc" / "core" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != mutant.times:
        raise ValueError(f"{mutant.name}: found {text.count(mutant.old)} times in {mutant.file}: {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new))


def compile_command(kind: str, root: Path, program: Path) -> list[str]:
    """How CMake compiles the probe, but from root, linked at once, and without optimisation: it is built many times."""
    entries = json.loads((cpp_build.configure(kind) / "compile_commands.json").read_text())
    (command,) = (shlex.split(e["command"]) for e in entries if e["file"] == str(cpp_build.ROOT / PROBE))
    output = command.index("-o")
    command = command[:output] + command[output + 2 :]
    command = [c.replace(str(cpp_build.ROOT), str(root)) for c in command if c != "-c"]
    return [*command, "-O0", "-g0", "-w", "-pthread", "-o", str(program)]


def fingerprint(root: Path, command: list[str]) -> str:
    """Of everything the probe is made from."""
    digest = hashlib.sha256(shlex.join(command).encode())
    for path in sorted(root.rglob("*.*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def outcome(mutant: Mutant) -> tuple[int, str]:
    """Status and output of the probe; status 0 means that the bug went unnoticed.

    Raises:
        AssertionError: it does not compile.
    """
    root = FOLDER / f"{mutant.name}-{mutant.kind}"
    program, key = root.with_suffix(".out"), root.with_suffix(".key")
    plant(mutant, root)
    command = compile_command(mutant.kind, root, program)
    wanted = fingerprint(root, command)
    if not (program.exists() and key.exists() and key.read_text() == wanted):
        cpp_build.must(command, 240)
        key.write_text(wanted)
    shutil.rmtree(root)
    done = cpp_build.call([str(program), LANES[mutant.kind]], 60)
    return done.returncode, done.stdout


def main() -> None:
    with ThreadPoolExecutor(2) as pool:
        for mutant, (status, output) in zip(
            [*CONTROLS, *MUTANTS], pool.map(outcome, [*CONTROLS, *MUTANTS]), strict=True
        ):
            why = "" if status == 0 else next(iter(output.splitlines()), "")
            print(
                f"{mutant.kind:6} {mutant.name:46} {'unnoticed' if status == 0 else 'noticed'}  {why[:90]}", flush=True
            )


if __name__ == "__main__":
    main()
