"""Plants one bug at a time into a copy of a layer of csrc and asks a program of tests/cpp whether it notices: of
csrc/core core_probe, or local_probe what hosts do inside; of csrc/carried test_carried and test_two_level.

    python tests/mutants.py     prints a table

A replacement that does not match as often as it says is an error: the code has moved on and the mutant must follow.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cpp_build

FOLDER = cpp_build.FOLDER / "mutants"
# What is compiled anew, from a copy of csrc.
PROBES = {"local.h": "tests/cpp/local_probe.cpp", "shards.h": "tests/cpp/local_probe.cpp"}  # by file; else core_probe
# By file of csrc/carried: the program whose other objects are taken as they are.
PROGRAMS = {"schedule.cpp": "test_carried", "two_level.cpp": "test_two_level"}
# test_carried: each fifth call, and 5 s for what should take milliseconds.
ARGUMENTS = {("core", "plain"): ["2"], ("core", "tsan"): ["3"], ("carried", "plain"): ["5", "5"]}


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in a file of the layer; the run of that kind must fail."""

    name: str
    kind: str  # plain: the bits are wrong; tsan: they may be right, on this processor, this time
    file: str = ""
    old: str = ""
    new: str = ""
    times: int = 1
    layer: str = "core"

    @property
    def source(self) -> str:
        """What is compiled anew."""
        if self.layer == "carried":
            return f"csrc/carried/{self.file}"
        return PROBES.get(self.file, "tests/cpp/core_probe.cpp")


def schedule(name: str, old: str, new: str) -> Mutant:
    """A bug in how csrc/carried orders steps and messages."""
    return Mutant(name, "plain", "schedule.cpp", old, new, layer="carried")


def two_level(name: str, old: str, new: str) -> Mutant:
    """A bug in how it goes with rounds inside hosts."""
    return Mutant(name, "plain", "two_level.cpp", old, new, layer="carried")


def control(name: str, kind: str, file: str, layer: str = "core") -> Mutant:
    """No bug: the program must pass. `file` says which program."""
    return Mutant(name, kind, file, layer=layer)


CONTROLS = [
    control("control", "plain", "portable.h"),
    control("control", "tsan", "portable.h"),
    control("local_control", "plain", "local.h"),
    control("local_control", "tsan", "local.h"),
    control("carried_control", "plain", "schedule.cpp", "carried"),
    control("two_level_control", "plain", "two_level.cpp", "carried"),
]
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
        "chunks.range(slice, owner);\n    put<Codec>",
        "chunks.range(slice, t.rank);\n    put<Codec>",
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
    # ---- steps and messages where a carrier moves them
    schedule(
        "given_into_another_slot",
        "receive(peer, slot(t_, kGiven, peer, t_.rank, uint32_t(slice)), mine);",
        "receive(peer, slot(t_, kGiven, peer, t_.rank, uint32_t(slice + 1)), mine);",
    ),
    schedule("reduced_before_it_arrived", "if (!arrived()) return false;\n  const Range mine", "const Range mine"),
    schedule(
        "sent_before_it_is_reduced",
        "if (mine.groups > 0) run({Step::Kind::reduce, t_.rank, slice, 0, 0, 0}, place != nullptr);\n  begin();",
        "const struct Late {\n"
        "    Player& player;\n"
        "    const Step step;\n"
        "    bool in_place;\n"
        "    ~Late() { player.run(step, in_place); }\n"
        "  } late{*this, {Step::Kind::reduce, t_.rank, slice, 0, 0, 0}, place != nullptr};\n  begin();",
    ),
    schedule("result_in_user_memory_only", "place != nullptr);", "values_travel_);"),
    schedule("taken_from_another_owner", "run({Step::Kind::take, peer,", "run({Step::Kind::take, t_.rank,"),
    schedule("own_gift_is_not_encoded", "if (!values_travel_ && mine.groups > 0) run(", "if (false) run("),
    schedule("short_group_in_user_memory", "<= s.elems / kGroup", "<= (s.elems + kGroup - 1) / kGroup"),
    schedule("codes_in_user_memory", "if (!values_travel_) return", "if (false) return"),
    schedule("oneshot_reduces_the_next_slice", "t_.rank, number - kAhead, 0", "t_.rank, number - kAhead + 1, 0"),
    schedule("ring_receives_another_chunk", "ring_range(slice, previous - turn)", "ring_range(slice, t_.rank - turn)"),
    schedule("ring_receives_into_another_slot", "previous, t_.rank, ring_sent_)", "previous, t_.rank, ring_sent_ + 1)"),
    schedule("ring_reads_one_slot_again", "if (turn > 0) ++ring_read_;", "if (turn > 1) ++ring_read_;"),
    # ---- inside hosts, and around the exchange between them
    two_level("spread_before_it_arrived", "number - 2 * kAhead, own, false", "number - kAhead, own, false"),
    two_level("own_part_is_not_spread", "(part == host) == own", "(part != host) && !own"),
    two_level("gathered_one_slice_late", "LocalTurn::gather, number, part", "LocalTurn::gather, number - 1, part"),
    Mutant(
        "added_before_it_arrived",
        "tsan",
        "local.h",
        "if (!wait_peers(lanes, t, kGiven, number + 1)) return false;  // pairs with (6)",
        "",
    ),
    Mutant(
        "adopted_before_it_arrived",
        "tsan",
        "local.h",
        "if (!wait_peers(lanes, t, kResult, number + 1)) return false;  // pairs with (7)",
        "",
    ),
    Mutant("owner_keeps_what_it_had", "plain", "local.h", "if (Codec::scaled) {", "if (false) {"),
    Mutant("shards_of_one_owner_overlap", "plain", "shards.h", "int(message / each) * ranks", "int(message / each)"),
]


def plant(mutant: Mutant, root: Path) -> None:
    """Copies the layers that the program is made anew from, and the core's probe, to root, with the bug in it.

    Raises:
        ValueError: the text to replace is not there as often as the mutant says.
    """
    shutil.rmtree(root, ignore_errors=True)
    for layer in {"core", mutant.layer}:
        shutil.copytree(cpp_build.ROOT / "csrc" / layer, root / "csrc" / layer)
    if mutant.layer == "core":
        ignored = shutil.ignore_patterns("test_*")
        shutil.copytree(cpp_build.ROOT / "tests" / "cpp", root / "tests" / "cpp", ignore=ignored)
    if not mutant.old:
        return
    path = root / "csrc" / mutant.layer / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != mutant.times:
        raise ValueError(f"{mutant.name}: found {text.count(mutant.old)} times in {mutant.file}: {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new))


def prepare(wanted: Iterable[Mutant]) -> None:
    """What mutants share is built before their threads start."""
    for mutant in wanted:
        cpp_build.configure(mutant.kind)
        linked(mutant)


def linked(mutant: Mutant) -> list[Path]:
    """What is taken as it was built for the test itself. Of a library the linker leaves out what it has already."""
    if mutant.layer == "core":
        return []
    program = PROGRAMS[mutant.file]
    built = cpp_build.build(mutant.kind, (program,))
    return [built / "CMakeFiles" / f"{program}.dir" / f"{program}.cpp.o", built / "libdpcomm_tested.a"]


def compile_command(mutant: Mutant, root: Path, program: Path) -> list[str]:
    """How CMake compiles the source, but from root, linked at once, without optimisation: it is built many times."""
    source = str(cpp_build.ROOT / mutant.source)
    entries = json.loads((cpp_build.configure(mutant.kind) / "compile_commands.json").read_text())
    (command,) = (
        shlex.split(e["command"]) for e in entries if e["file"] == source and "dpcomm_host.dir" not in e["command"]
    )
    output = command.index("-o")
    command = command[:output] + command[output + 2 :]
    command = [c.replace(str(cpp_build.ROOT), str(root)) for c in command if c != "-c"]
    return [*command, "-O0", "-g0", "-w", *map(str, linked(mutant)), "-pthread", "-o", str(program)]


def fingerprint(mutant: Mutant, root: Path, command: list[str]) -> str:
    """Of everything the program is made from."""
    digest = hashlib.sha256(shlex.join(command).encode())
    for path in [*sorted(root.rglob("*.*")), *linked(mutant)]:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def outcome(mutant: Mutant) -> tuple[int, str]:
    """Status and output of the program; status 0 means that the bug went unnoticed.

    Raises:
        AssertionError: it does not compile.
    """
    root = FOLDER / f"{mutant.name}-{mutant.kind}"
    program, key = root.with_suffix(".out"), root.with_suffix(".key")
    plant(mutant, root)
    command = compile_command(mutant, root, program)
    wanted = fingerprint(mutant, root, command)
    if not (program.exists() and key.exists() and key.read_text() == wanted):
        cpp_build.must(command, 240)
        key.write_text(wanted)
    shutil.rmtree(root)
    done = cpp_build.call([str(program), *ARGUMENTS[mutant.layer, mutant.kind]], 60)
    return done.returncode, done.stdout


def main() -> None:
    prepare([*CONTROLS, *MUTANTS])
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
