"""The kernels as the compiler made them: each instruction set's object stands alone, and its hot loops are vectors.

The objects are those that the extension was linked from; where its build folder is gone they are compiled anew.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cpp_build
import pytest
from disassembly import Function, Instruction, Loop, Object

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.timeout(900),  # where the kernels must be compiled anew
    pytest.mark.skipif(
        platform.machine().lower() not in ("x86_64", "amd64"),
        reason=f"{platform.machine()} has one instruction set, and the instructions looked for are those of x86-64",
    ),
]

REGISTER = {"portable": "%xmm", "avx2": "%ymm", "avx512": "%zmm"}  # a full vector
ISAS = tuple(REGISTER)
isas = pytest.mark.parametrize("isa", ISAS)
# What is compiled once per instruction set -> its entry. Steps have no streaming stores: what they write is sent next.
LIBRARIES = {"kernels": "run", "steps": "run_step"}
libraries = pytest.mark.parametrize("library", LIBRARIES)
Commands = dict[tuple[str, str], tuple[list[str], Path]]  # (library, instruction set) -> command, object
ALGORITHMS = ("direct", "oneshot", "ring")
# What adds a vector of each codec's sums, without the v of AVX.
ADDS = {
    "None<Float32>": "addps",
    "None<Float64>": "addpd",
    "None<Float16>": "addps",
    "None<Bfloat16>": "addps",
    "None<Whole<int>>": "paddd",
    "None<Whole<long>>": "paddq",
    "Fp16<Float32>": "addps",
    "Fp16<Float16>": "addps",
    "Fp16<Bfloat16>": "addps",
}
# Vectors of these fill two registers: GCC 12 adds them in full but moves them through the stack in smaller pieces.
TWO_REGISTERS = {"None<Float64>", "None<Whole<long>>"}
CONVERSIONS = {"vcvtph2ps", "vcvtps2ph"}
PLAIN = re.compile(r"v?mov(dq[ua](8|16|32|64)?|[ua]p[sd])")
STREAMING = re.compile(r"v?movnt(dq|p[sd])")
# Four codes of 16 bits, as the portable kernels have them, fill half a register.
HALF_PLAIN = re.compile(r"mov(q|lp[sd]) %xmm\d+,")
HALF_STREAMING = re.compile(r"movnti %r\w+,")
codecs = pytest.mark.parametrize("codec", ADDS)
# What a kernel may leave to the C library, besides functions of dpcomm that are compiled once.
C_LIBRARY = {"memcpy", "memmove", "memset", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}
FUSED = re.compile(r"vfn?m(add|sub)")
BIT_MANIPULATION = re.compile(r"andn|bextr|bls(i|r|msk)|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt")  # not asked for


# --- the objects -----------------------------------------------------------------------------------------------------


def read_commands(folder: Path) -> Commands:
    """The compiler's commands and the objects they make, as CMake wrote them down."""
    path = folder / "compile_commands.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    found = {}
    for entry in entries:
        if isa := re.search(r"-DDPCOMM_ISA=(\w+)", entry["command"]):
            words = shlex.split(entry["command"])
            made = Path(entry["directory"], words[words.index("-o") + 1])
            found[Path(entry["file"]).stem, isa[1]] = (words, made)
    return found


@cache
def commands() -> Commands:
    wanted = {(library, isa) for library in LIBRARIES for isa in ISAS}
    installed = read_commands(ROOT / "build" / str(sysconfig.get_config_var("SOABI")))
    if wanted <= {key for key, (_, path) in installed.items() if path.exists()}:
        return installed
    folder = cpp_build.FOLDER / "kernels"
    options = ["-DDPCOMM_EXTENSION=OFF", "-DDPCOMM_CUDA=OFF"]
    cpp_build.must(["cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja", *options], 120)
    cpp_build.must(["cmake", "--build", str(folder), "--target", *("_".join(key) for key in wanted)], 800)
    return read_commands(folder)


@cache
def compiled(library: str, isa: str) -> Object:
    return Object(commands()[library, isa][1])


def compile_small(source: str, isa: str, folder: Path, *flags: str) -> Object:
    """An object of a few lines, with the flags of an instruction set's kernels and then others."""
    words, _ = commands()["kernels", isa]
    at = words.index("-o")
    folder.mkdir(exist_ok=True)
    text, made = folder / f"{isa}.cpp", folder / f"{isa}.o"
    text.write_text(source)
    cpp_build.must([*words[:at], *flags, "-o", str(made), "-c", str(text)], 120)
    return Object(made)


# --- symbols ---------------------------------------------------------------------------------------------------------


def foreign_symbols(objects: dict[str, Object]) -> list[str]:
    """What could make one instruction set's code answer for another's."""
    complaints = []
    for isa, made in objects.items():
        for symbol in made.symbols:
            if symbol.shared:
                complaints.append(f"{isa}: weak: {symbol.name}")
            elif symbol.kind == "U":
                common = symbol.name.startswith("dpcomm::") and symbol.name.split("::")[1] not in ISAS
                if not common and symbol.name not in C_LIBRARY:
                    complaints.append(f"{isa}: needs: {symbol.name}")
            elif f"dpcomm::{isa}::" not in symbol.name:
                complaints.append(f"{isa}: outside its namespace: {symbol.name}")
    return complaints


@libraries
def test_instruction_sets_share_no_symbol(library: str) -> None:
    objects = {isa: compiled(library, isa) for isa in ISAS}
    assert foreign_symbols(objects) == []
    for isa, made in objects.items():
        entry = f"dpcomm::{isa}::{LIBRARIES[library]}("
        assert [s.name.startswith(entry) for s in made.symbols if s.kind == "T"] == [True]


SHARED = """
namespace dpcomm {
__attribute__((noinline)) inline int twice(int x) { return 2 * x; }
int once(int);
inline namespace DPCOMM_ISA {
int run(int x) { return twice(once(x)); }
}
}
int stray(int x) { return dpcomm::run(x); }
"""


def test_a_shared_symbol_would_be_found(tmp_path: Path) -> None:
    """Negative control: an inline function outside the namespace, of which the linker would keep one."""
    objects = {isa: compile_small(SHARED, isa, tmp_path) for isa in ISAS}
    complaints = foreign_symbols(objects)
    for isa in ISAS:
        assert f"{isa}: weak: dpcomm::twice(int)" in complaints
        assert f"{isa}: outside its namespace: stray(int)" in complaints
    assert len(complaints) == 2 * len(ISAS)  # dpcomm::once and dpcomm::<isa>::run are as they should be


# --- instructions that a processor may lack --------------------------------------------------------------------------


def foreign_instructions(made: Object, isa: str) -> list[str]:
    """Instructions that isas() in csrc/cpu/dispatch.cpp does not ask for before it offers this set."""
    forbidden = {"portable": ("0f38", "VEX", "EVEX"), "avx2": ("EVEX",), "avx512": ()}[isa]
    found = set()
    for function in made.functions:
        for i in function.body:
            if i.encoding in forbidden or FUSED.match(i.name) or BIT_MANIPULATION.fullmatch(i.name):
                found.add(i.name)
    return sorted(found)


@libraries
@isas
def test_no_instruction_is_of_a_higher_set_or_fuses(isa: str, library: str) -> None:
    """Fused multiply-adds round once where the reference rounds twice: none, even where the processor has them."""
    assert foreign_instructions(compiled(library, isa), isa) == []


ARITHMETIC = """
namespace dpcomm { inline namespace DPCOMM_ISA {
void run(float* x, const float* y) { for (int i = 0; i < 1024; ++i) x[i] = x[i] * y[i] + 1.0f; }
void run(int* x, const int* y) { for (int i = 0; i < 1024; ++i) x[i] = x[i] > y[i] ? x[i] : y[i]; }
} }
"""


@pytest.mark.parametrize(
    ("isa", "flags", "found"),
    [
        ("portable", ["-mavx"], "vmulps"),
        ("portable", ["-msse4.1"], "pmaxsd"),
        ("avx2", ["-mavx512f", "-mavx512vl", "-mprefer-vector-width=512"], "vmulps"),
        ("avx2", ["-mfma", "-ffp-contract=fast"], "vfmadd"),
        ("avx512", ["-mfma", "-ffp-contract=fast"], "vfmadd"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_foreign_instruction_would_be_found(tmp_path: Path, isa: str, flags: list[str], found: str) -> None:
    """Negative control: the same flags, and then one too many."""
    assert foreign_instructions(compile_small(ARITHMETIC, isa, tmp_path / "good"), isa) == []
    names = foreign_instructions(compile_small(ARITHMETIC, isa, tmp_path / "bad", *flags), isa)
    assert any(name.startswith(found) for name in names), names


# --- hot loops -------------------------------------------------------------------------------------------------------


class Kernel:
    """An algorithm and codec of kernels.cpp or steps.cpp, compiled."""

    def __init__(self, function: Function, isa: str, codec: str) -> None:
        self.name, self.isa, self.codec = plain(function.name, isa), isa, codec
        self.loops = function.loops()
        self.adding = self.around(self.adds)

    def around(self, wanted: Callable[[Instruction], bool]) -> list[Loop]:
        """The loops that have a wanted instruction of their own, not just within a smaller loop."""
        seen: set[int] = set()
        found = []
        for loop in self.loops:
            if any(wanted(i) and i.address not in seen for i in loop):
                found.append(loop)
            seen.update(i.address for i in loop)
        return found

    def adds(self, i: Instruction) -> bool:
        return i.name.removeprefix("v") == ADDS[self.codec]

    def stores_plainly(self, i: Instruction) -> bool:
        return self.fills_codes(i, PLAIN, HALF_PLAIN) or self.converts_into_memory(i)

    def streams(self, i: Instruction) -> bool:
        return self.fills_codes(i, STREAMING, HALF_STREAMING)

    def converts_into_memory(self, i: Instruction) -> bool:
        into = rf"\$\w+,{REGISTER[self.isa]}\d+,.*\(%(?!rsp|rbp).*\)"
        return i.name == "vcvtps2ph" and re.fullmatch(into, i.operands) is not None

    def fills_codes(self, i: Instruction, whole: re.Pattern[str], half: re.Pattern[str]) -> bool:
        """A vector of codes goes to memory. It is half as wide as the vectors of the sum where 16 bits travel."""
        if re.search(r"\(%(?!rsp|rbp).*\)$", i.operands) is None:
            return False
        if "16" in self.codec and self.isa == "portable":
            return half.match(f"{i.name} {i.operands}") is not None
        width = REGISTER[self.isa]
        if self.codec in TWO_REGISTERS:
            width = "%[xyz]mm"
        elif "16" in self.codec:
            width = {"%ymm": "%xmm", "%zmm": "%ymm"}[width]
        return whole.fullmatch(i.name) is not None and re.match(width, i.operands) is not None


def plain(name: str, isa: str) -> str:
    """A demangled name without its namespaces."""
    return name.replace(f"dpcomm::{isa}::", "").replace("> >", ">>")


def kernels_of(made: Object, isa: str, codec: str) -> list[Kernel]:
    wanted = [f" run_{algorithm}<{codec}" for algorithm in ALGORITHMS]
    chosen = [f for f in made.functions if any(name in plain(f.name, isa) for name in wanted)]
    return [Kernel(f, isa, codec) for f in chosen]


def calls(loop: Loop) -> bool:
    return any(i.name.startswith("call") for i in loop)


def slow_loops(kernel: Kernel, library: str = "kernels") -> list[str]:
    """What is wrong with the loops that add and with those that store."""
    complaints = [] if kernel.adding else ["no loop adds vectors"]
    for loop in kernel.adding:
        if calls(loop):
            complaints.append(f"the loop at {loop[0].address:#x} calls")
        if not all(REGISTER[kernel.isa] in i.operands for i in loop if kernel.adds(i)):
            complaints.append(f"the loop at {loop[0].address:#x} adds less than full vectors")
    stores = {"plainly": kernel.stores_plainly, "past the cache": kernel.streams}
    if library == "steps":
        del stores["past the cache"]
    for how, wanted in stores.items():
        if all(calls(loop) for loop in kernel.around(wanted)):
            complaints.append(f"no loop stores full vectors {how}")
    return [f"{kernel.isa}: {kernel.name}: {complaint}" for complaint in complaints]


@libraries
@isas
@codecs
def test_hot_loops_are_full_vectors_without_calls(isa: str, codec: str, library: str) -> None:
    found = kernels_of(compiled(library, isa), isa, codec)
    assert len(found) >= len(ALGORITHMS)
    assert [complaint for kernel in found for complaint in slow_loops(kernel, library)] == []


@libraries
@isas
@pytest.mark.parametrize("codec", ["None<Float16>", "Fp16<Float32>"])
def test_halves_are_converted_by_instructions_where_there_are_any(isa: str, codec: str, library: str) -> None:
    for kernel in kernels_of(compiled(library, isa), isa, codec):
        wide = {i.name for loop in kernel.loops for i in loop if REGISTER[isa] in i.operands}
        assert wide & CONVERSIONS == (set() if isa == "portable" else CONVERSIONS), kernel.name
        for loop in kernel.adding:
            assert isa == "portable" or "vcvtph2ps" in {i.name for i in loop}, f"{kernel.name}: {loop[0].address:#x}"


LOOP = """
namespace dpcomm { inline namespace DPCOMM_ISA {
struct Float32;
template <class Element> struct None;
#if defined(__AVX512F__)
constexpr int kVec = 16;
#define STREAM __builtin_ia32_movntps512
#elif defined(__AVX__)
constexpr int kVec = 8;
#define STREAM __builtin_ia32_movntps256
#else
constexpr int kVec = 4;
#define STREAM __builtin_ia32_movntps
#endif
typedef float Vec __attribute__((vector_size(4 * kVec), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(2 * kVec), aligned(4), may_alias));
void other(float*);
inline Vec sum(const float* a, const float* b) { return *(const Vec*)a + *(const Vec*)b; }
template <class Codec> bool run_direct(float* to, const float* a, const float* b, long n, long bytes, bool streaming) {
  for (long i = 0; streaming && i < n; i += kVec) STREAM(to + i, sum(a + i, b + i));
  for (long i = 0; !streaming && i < n; i += kVec) {
    const Vec v = sum(a + i, b + i);
    *(Vec*)(to + i) = v;
  }
  return bytes > 0;
}
template bool run_direct<None<Float32>>(float*, const float*, const float*, long, long, bool);
} }
"""
PLAIN_STORE = "*(Vec*)(to + i) = v;"
# What is planted: text, what replaces it, flags, and the complaint that must come.
FAULTS = {
    "call": (PLAIN_STORE, PLAIN_STORE + " other(to);", [], "calls"),
    "memcpy": (PLAIN_STORE, "__builtin_memcpy(to + i, &v, bytes);", [], "calls"),
    "not-inlined": ("inline Vec", "__attribute__((noinline)) static Vec", [], "no loop adds vectors"),
    "not-optimised": ("", "", ["-O1", "-fno-inline"], "no loop adds vectors"),
    "scalar": ("*(const Vec*)a + *(const Vec*)b", "Vec{a[0] + b[0]}", [], "no loop adds vectors"),
    "narrow": (PLAIN_STORE, "*(Half*)(to + i) = *(const Half*)(a + i) + (Half){v[0]};", [], "full vectors"),
    "no-streaming": ("STREAM(to + i, sum(a + i, b + i))", "to[i] = sum(a + i, b + i)[0]", [], "past the cache"),
}


def judge(source: str, isa: str, folder: Path, *flags: str) -> list[str]:
    (kernel,) = kernels_of(compile_small(source, isa, folder, *flags), isa, "None<Float32>")
    return slow_loops(kernel)


@pytest.mark.parametrize(
    ("isa", "fault"),
    [(isa, f) for isa in ISAS for f in FAULTS if (isa, f) != ("portable", "narrow")],  # no register is narrower
)
def test_a_slow_loop_would_be_found(tmp_path: Path, isa: str, fault: str) -> None:
    """Negative control: a loop as it should be, and the same with one fault."""
    old, new, flags, complaint = FAULTS[fault]
    assert judge(LOOP, isa, tmp_path / "good") == []
    assert old == "" or LOOP.count(old) == 1
    complaints = judge(LOOP.replace(old, new) if old else LOOP, isa, tmp_path / "bad", *flags)
    assert any(complaint in text for text in complaints), complaints
