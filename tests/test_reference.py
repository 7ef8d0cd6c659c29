"""The reference against facts that do not come from it: exact fractions, closed forms, torch's and C's conversions."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import values
from numpy.typing import NDArray
from reference import allreduce, decode_fp16, encode_fp16, relative_l2

Array = NDArray[Any]
FORMATS = {"float16": (11, -14, 15), "float32": (24, -126, 127), "bfloat16": (8, -126, 127)}  # digits, emin, emax


def rounded(exact: Fraction, dtype: str) -> float:
    """The nearest number of a binary format, ties to even, from the definition."""
    if exact == 0:
        return 0.0
    digits, least, most = FORMATS[dtype]
    exponent = math.frexp(float(exact))[1] - 1
    last_place = Fraction(2) ** (max(exponent, least) - digits + 1)
    result = round(exact / last_place) * last_place  # Python rounds ties of fractions to even
    return float(result) if abs(result) < Fraction(2) ** (most + 1) else math.copysign(math.inf, result)


def gaussians(nranks: int, count: int, sigma: float = 1.0, seed: int = 0) -> list[list[Array]]:
    rng = np.random.default_rng([seed, nranks, count])
    return [[(rng.standard_normal(count) * sigma).astype(np.float32)] for _ in range(nranks)]


def bits(x: Array) -> Array:
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


# --- codec fp16 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1e-42, 1e-30, 1e-5, 1.0, 65504.0, 1e30, 1e38])
def test_encode_rounds_exact_products_to_nearest_even(sigma: float) -> None:
    group = (np.random.default_rng(1).standard_normal(256) * sigma).clip(-3e38, 3e38).astype(np.float32)
    codes, exponent = encode_fp16(group)
    k = int(exponent)
    for value, code in zip(group, codes, strict=True):
        exact = Fraction(float(value)) * Fraction(2) ** k
        assert struct.unpack("<e", struct.pack("<H", code))[0] == rounded(exact, "float16")


@pytest.mark.parametrize("top", [1e-37, 2.0**-112, 6.1e-5, 1.0, math.nextafter(2.0, 0.0), 2.0, 1e30, 3.4028234e38])
def test_exponent_puts_maximum_between_2_14_and_2_15(top: float) -> None:
    group = np.zeros(100, np.float32)
    group[37] = -np.float32(top)
    k = int(encode_fp16(group)[1])
    assert k == min(14 - (math.frexp(float(np.float32(top)))[1] - 1), 126)
    if k < 126:
        assert 2.0**14 <= math.ldexp(float(np.float32(top)), k) < 2.0**15


def test_exponent_of_groups_without_finite_numbers_is_zero_and_is_clamped_for_denormals() -> None:
    groups = np.zeros((5, 4), np.float32)
    groups[1] = -0.0
    groups[2] = [np.inf, np.nan, -np.inf, 0]
    groups[3, 0] = 1e-45
    groups[4, :2] = [np.inf, 1]
    assert encode_fp16(groups)[1].tolist() == [0, 0, 0, 126, 14]


def test_nan_and_inf_stay_themselves_alone() -> None:
    group = np.array([np.inf, 1.5, -np.inf, -2.0, 0.0, 0.0], np.float32)
    group.view(np.uint32)[4:] = [0xFFC12345, 0x7F800001]  # a negative NaN with payload, a signalling one
    codes, exponent = encode_fp16(group)
    assert [int(codes[i]) for i in (0, 2, 4, 5)] == [0x7C00, 0xFC00, 0x7E00, 0x7E00]
    decoded = decode_fp16(codes, exponent)
    assert decoded[[0, 1, 2, 3]].tolist() == [np.inf, 1.5, -np.inf, -2.0]
    assert bits(decoded)[4:].tolist() == [0x7FC00000] * 2


@pytest.mark.parametrize("k", [-113, -1, 0, 14, 126])
def test_decode_of_every_code_is_exact(k: int) -> None:
    codes = np.arange(1 << 16, dtype=np.uint16)
    decoded = decode_fp16(codes.reshape(256, 256), np.full(256, k, np.int8)).reshape(-1)
    halves = np.array(struct.unpack("<65536e", codes.tobytes()))
    with np.errstate(over="ignore"):
        expected = np.ldexp(halves, -k).astype(np.float32)  # exact in float64, then one rounding
    nan = np.isnan(halves)
    assert np.array_equal(bits(decoded)[~nan], bits(expected)[~nan])
    assert set(bits(decoded)[nan].tolist()) == {0x7FC00000}


def test_only_values_next_to_the_largest_float_round_to_infinity() -> None:
    largest = float(np.finfo(np.float32).max)
    group = np.array([largest, largest * (1 - 2.0**-11), -largest * (1 - 2.0**-13)], np.float32)
    below = rounded(Fraction(float(group[1])) / 2**113, "float16") * 2.0**113
    assert reference.through_fp16(group).tolist() == [np.inf, below, -np.inf]


def test_small_elements_lose_bits_under_2_29_and_vanish_under_2_39() -> None:
    odd = 1 + 2.0**-10  # needs all eleven digits of a half
    group = np.array([1, 2.0**-28 * odd, 2.0**-30 * odd, 2.0**-38, 2.0**-39, 2.0**-41], np.float32)
    after = reference.through_fp16(group).tolist()
    assert after == [1, 2.0**-28 * odd, 2.0**-30, 2.0**-38, 0, 0]
    near_two = np.array([2 - 2.0**-10, 2.0**-28 * odd], np.float32)  # 2^-29 of the maximum, still whole
    assert reference.through_fp16(near_two).tolist() == near_two.tolist()


def test_groups_start_anew_in_each_segment() -> None:
    x = np.full(300, 1e-15, np.float32)
    x[:100] = 1e15
    whole, parts = [[x]] * 2, [[x[:100], x[100:]]] * 2
    assert allreduce(whole, codec="fp16")[0][150] == 0  # shares a group with 1e15
    assert allreduce(parts, codec="fp16")[1][50] == pytest.approx(2e-15, rel=1e-3)


@pytest.mark.parametrize("nranks", [2, 8, 64])
@pytest.mark.parametrize("sigma", [1e-30, 1.0, 1e30])
def test_error_of_fp16_stays_under_its_bound(sigma: float, nranks: int) -> None:
    """A rounding errs evenly within half a last place, 2^-11 of the value's power of two: 2^-11/sqrt(3) rms, times 0.73
    as values fill their binade. That is 2.06e-4 for all contributions together, whatever N is, and as much again for
    the result: 2.9e-4. An error of one more last place fails."""
    inputs = gaussians(nranks, 8192, sigma)
    exact = np.sum([x[0].astype(np.float64) for x in inputs], axis=0)
    result = allreduce(inputs, codec="fp16")[0]
    assert relative_l2(result, exact) < 3.3e-4
    assert relative_l2(allreduce(inputs, codec="fp16", op="mean")[0], exact / nranks) < 3.3e-4
    assert relative_l2(result * np.float32(1 + 2.0**-11), exact) > 3.3e-4  # the bound is not slack


# --- none ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit_class", ["rank_order", "ring"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
def test_integer_valued_sums_have_their_closed_form(dtype: str, bit_class: str) -> None:
    index = np.arange(1000)
    inputs = [[(index * (r + 1)).astype(dtype)] for r in range(5)]
    assert allreduce(inputs, bit_class=bit_class)[0].tolist() == (15 * index).tolist()


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_integers_wrap(dtype: str) -> None:
    rng = np.random.default_rng(2)
    span = np.iinfo(dtype)
    inputs = [[rng.integers(span.min, span.max, 50, dtype=dtype)] for _ in range(4)]
    size = 1 << span.bits
    exact = [sum(int(x[0][i]) for x in inputs) % size for i in range(50)]
    assert [int(v) % size for v in allreduce(inputs)[0]] == exact


@pytest.mark.parametrize("nranks", [2, 3, 5])
def test_float32_sums_round_once_a_term_in_rank_order(nranks: int) -> None:
    inputs = gaussians(nranks, 200, seed=3)
    for op in ("sum", "mean"):
        result = allreduce(inputs, op)[0]
        for i in range(200):
            total = Fraction(float(inputs[0][0][i]))
            for rank in range(1, nranks):
                total = Fraction(rounded(total + Fraction(float(inputs[rank][0][i])), "float32"))
            expected = rounded(total / nranks, "float32") if op == "mean" else float(total)
            assert result[i] == expected


def test_order_of_terms_shows() -> None:
    terms = [[np.array([v], np.float32)] for v in (1e8, 1.0, -1e8)]
    assert allreduce(terms)[0][0] == 0
    assert allreduce([terms[0], terms[2], terms[1]])[0][0] == 1


def test_mean_divides_and_does_not_multiply_by_an_inverse() -> None:
    inputs = gaussians(3, 1000, seed=4)
    total = allreduce(inputs)[0]
    assert not np.array_equal(allreduce(inputs, "mean")[0], total * np.float32(1 / 3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_sums_are_rounded_once_at_the_end(dtype: str) -> None:
    raw = gaussians(4, 300, seed=5)
    cast = reference.to_bf16 if dtype == "bfloat16" else (lambda x: x.astype(np.float16))
    inputs = [[cast(x[0])] for x in raw]
    result = reference.widen(allreduce(inputs)[0])
    for i in range(300):
        total = Fraction(0)
        for x in inputs:  # sums of four halves need rounding in float32 seldom, but they do
            total = Fraction(rounded(total + Fraction(float(reference.widen(x[0])[i])), "float32"))
        assert result[i] == rounded(total, dtype)


def test_bfloat16_conversions_equal_torch() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    codes = every.numpy().view(np.uint16)
    widened = every.view(torch.bfloat16).to(torch.float32).numpy()
    nan = np.isnan(widened)
    assert np.array_equal(bits(reference.from_bf16(codes))[~nan], bits(widened)[~nan])
    source = np.random.default_rng(6).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    source[:4] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF800000]  # two ties, overflow, -Inf
    values = source.view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    assert np.array_equal(reference.to_bf16(values)[~nan], expected[~nan])
    assert set(reference.to_bf16(values)[nan].tolist()) == {0x7FC0}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("op", ["min", "max"])
def test_extremes_let_nan_win_and_order_signed_zeros(dtype: str, op: str) -> None:
    columns = [(0.0, -0.0), (-0.0, 0.0), (np.nan, 1.0), (1.0, np.nan), (-np.inf, np.inf), (2.0, -3.0)]
    pairs = np.array(columns, np.float32).T
    carried: Any = {"bfloat16": reference.to_bf16}.get(dtype, lambda x: x.astype(dtype))
    result = reference.widen(allreduce([[carried(row)] for row in pairs], op)[0])
    zero = -0.0 if op == "min" else 0.0
    expected = [zero, zero, np.nan, np.nan, *((-np.inf, -3.0) if op == "min" else (np.inf, 2.0))]
    np.testing.assert_array_equal(result, np.array(expected))
    assert np.signbit(result[:2]).tolist() == [op == "min"] * 2


@pytest.mark.parametrize(
    ("dtype", "nan"), [("<u4", 0x7FC00000), ("<u8", 0x7FF8 << 48), ("<f2", 0x7E00), ("<u2", 0x7FC0)]
)
@pytest.mark.parametrize("op", ["sum", "mean", "min", "max"])
def test_nans_of_results_are_canonical_and_one_rank_keeps_its_own(dtype: str, nan: int, op: str) -> None:
    planted = {4: 0xFFC12345, 8: 0xFFF8 << 48 | 77}.get(np.dtype(dtype).itemsize, 0xFFF1)
    x = np.array([planted], np.dtype(dtype).str.replace("f", "u"))
    x = x.view({"<u4": np.float32, "<u8": np.float64, "<f2": np.float16, "<u2": np.uint16}[dtype])
    assert bits(allreduce([[x], [x]], op)[0]).tolist() == [nan]
    assert bits(allreduce([[x]], op)[0]).tolist() == [planted]


# --- ring, refusals --------------------------------------------------------------------------------------------------


def test_ring_of_three_ranks_written_out() -> None:
    inputs = gaussians(3, 256 * 4 + 10, seed=7)  # five groups: chunks of two, two and one
    x = [segments[0] for segments in inputs]
    result = allreduce(inputs, "mean", codec="fp16", bit_class="ring")[0]
    wire = reference.through_fp16
    for chunk, span in enumerate([slice(0, 512), slice(512, 1024), slice(1024, None)]):
        a, b, c = (x[(chunk + i) % 3][span] for i in range(3))
        expected = wire((wire(wire(a) + b) + c) / np.float32(3))
        assert np.array_equal(bits(result[span]), bits(expected))
    assert not np.array_equal(result, allreduce(inputs, "mean", codec="fp16")[0])  # another bit class


def test_ring_of_fp16_stays_under_its_bound() -> None:
    """Independent Gaussians, 8 ranks. The k-th of the N roundings of class `ring` acts on a sum of k terms, so
    its share of the error is sqrt(k/N) of one rounding's 2.08e-4: together 2.08e-4 * sqrt((N + 1) / 2) = 4.41e-4."""
    inputs = gaussians(8, 2**18, 1.0)
    exact = np.sum([x[0].astype(np.float64) for x in inputs], axis=0)
    ring, direct = (allreduce(inputs, codec="fp16", bit_class=c)[0] for c in ("ring", "rank_order"))
    assert relative_l2(ring, exact) < 4.7e-4
    assert relative_l2(ring, exact) > 1.3 * relative_l2(direct, exact)  # why direct is what auto takes


# --- two_level -------------------------------------------------------------------------------------------------------

KINDS = [(dtype, op, "none") for dtype in ("float32", "float64", "int32", "int64") for op in ("sum", "min", "max")] + [
    (dtype, op, codec) for dtype in ("float32", "bfloat16") for op in ("sum", "mean") for codec in ("none", "fp16")
]
BY_TWO = [[0, 1], [2, 3]]


def two_level(inputs: list[list[Array]], op: str = "sum", *, hosts: list[list[int]], **codecs: str) -> list[Array]:
    return allreduce(inputs, op, bit_class="two_level", hosts=hosts, **codecs)


def of_kind(dtype: str, nranks: int, count: int = 700) -> list[list[Array]]:
    rng = np.random.default_rng([8, nranks])
    return [[values(dtype, count, rng, special=dtype.startswith(("f", "b")))] for _ in range(nranks)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
@pytest.mark.parametrize("hosts", [BY_TWO, [[0, 2], [1, 3]], [[0], [1, 2, 3]], [[0, 1, 2, 3]]], ids=str)
def test_integer_valued_sums_of_hosts_have_their_closed_form(hosts: list[list[int]], dtype: str) -> None:
    index = np.arange(1000)
    inputs = [[(index * (r + 1)).astype(dtype)] for r in range(4)]
    assert two_level(inputs, hosts=hosts)[0].tolist() == (10 * index).tolist()
    assert two_level(inputs, "max", hosts=hosts)[0].tolist() == (4 * index).tolist()
    assert two_level(inputs, "min", hosts=hosts)[0].tolist() == index.tolist()


@pytest.mark.parametrize("hosts", [BY_TWO, [[0, 1, 2], [3]], [[0, 1, 2, 3]], [[0], [1], [2], [3]]], ids=str)
@pytest.mark.parametrize("codec", ["none", "fp16"])
@pytest.mark.parametrize("intra_codec", ["none", "fp16"])
def test_means_of_hosts_divide_by_all_ranks(hosts: list[list[int]], codec: str, intra_codec: str) -> None:
    """Whole numbers to 2**9 and their sums need eleven digits at most: no codec rounds them."""
    inputs = [[np.array([4.0 * r, 8.0, 512.0, 0.0], np.float32)] for r in range(4)]
    found = two_level(inputs, "mean", hosts=hosts, codec=codec, intra_codec=intra_codec)[0]
    assert found.tolist() == [6.0, 8.0, 512.0, 0.0]


@pytest.mark.parametrize(("dtype", "op", "codec"), KINDS)
def test_hosts_of_one_rank_each_are_rank_order(dtype: str, op: str, codec: str) -> None:
    inputs = of_kind(dtype, 3)
    found = two_level(inputs, op, hosts=[[0], [1], [2]], codec=codec)[0]
    assert np.array_equal(bits(found), bits(allreduce(inputs, op, codec=codec)[0]))


def test_hosts_of_one_rank_take_the_codec_inside_hosts_too() -> None:
    """It shows where a maximum is rounded up to a power of two: the exponent then changes, and the smallest values
    lose the bit that they had kept."""
    inputs = of_kind("float32", 3)
    for (x,) in inputs:
        x[-2:] = [2 - 2.0**-13, 2.0**-28 * (1 + 2.0**-10)]
        x[512:-2] = 0  # the last group
    wire = reference.through_fp16
    once = [[wire(x)] for (x,) in inputs]
    found = two_level(inputs, hosts=[[0], [1], [2]], codec="fp16", intra_codec="fp16")[0]
    assert np.array_equal(bits(found), bits(wire(allreduce(once, codec="fp16")[0])))
    assert not np.array_equal(bits(found), bits(allreduce(inputs, codec="fp16")[0]))  # control


def test_one_hosts_sum_travels_once_more() -> None:
    inputs = gaussians(4, 700, seed=9)
    total, mean = (allreduce(inputs, op)[0] for op in ("sum", "mean"))
    for op, plain in (("sum", total), ("mean", mean)):
        assert np.array_equal(bits(two_level(inputs, op, hosts=[[0, 1, 2, 3]])[0]), bits(plain))
    found = two_level(inputs, "mean", hosts=[[0, 1, 2, 3]], codec="fp16")[0]
    wire = reference.through_fp16
    assert np.array_equal(bits(found), bits(wire(wire(total) / np.float32(4))))


def test_two_hosts_of_two_written_out() -> None:
    inputs = gaussians(4, 700, seed=10)
    a, b, c, d = (segments[0] for segments in inputs)
    wire = reference.through_fp16

    def between(left: Array, right: Array) -> Array:
        return wire((wire(left) + wire(right)) / np.float32(4))

    def found(codec: str, intra_codec: str) -> Array:
        return bits(two_level(inputs, "mean", hosts=BY_TWO, codec=codec, intra_codec=intra_codec)[0])

    plain = ((a + b) + (c + d)) / np.float32(4)
    assert np.array_equal(found("none", "none"), bits(plain))
    assert np.array_equal(found("none", "fp16"), bits(plain))  # codec none: inside, too
    assert np.array_equal(found("fp16", "none"), bits(between(a + b, c + d)))
    both = wire(between(wire(a) + wire(b), wire(c) + wire(d)))
    assert np.array_equal(found("fp16", "fp16"), bits(both))
    assert not np.array_equal(found("fp16", "fp16"), found("fp16", "none"))  # control


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("intra_codec", ["none", "fp16"])
def test_sixteen_bit_sums_of_hosts_are_rounded_in_memory(dtype: str, intra_codec: str) -> None:
    inputs = [[x] for (x,) in of_kind(dtype, 4)]
    dtype_of = inputs[0][0].dtype
    wire, wide = reference.through_fp16, reference.widen

    def memory(x: Array) -> Array:
        return wide(reference.narrow(x, dtype_of))

    def inside(x: Array) -> Array:
        return wire(x) if intra_codec == "fp16" else x

    a, b, c, d = (wide(segments[0]) for segments in inputs)
    with np.errstate(all="ignore"):
        left, right = memory(inside(a) + inside(b)), memory(inside(c) + inside(d))
        expected = reference.narrow(inside(memory(wire(wire(left) + wire(right)))), dtype_of)
    found = two_level(inputs, hosts=BY_TWO, codec="fp16", intra_codec=intra_codec)[0]
    assert np.array_equal(bits(found), bits(expected))
    assert not np.array_equal(bits(found), bits(allreduce(inputs, codec="fp16")[0]))  # control


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_other_partitions_give_other_bits(op: str) -> None:
    inputs = gaussians(4, 2000, seed=11)
    partitions = [BY_TWO, [[0, 2], [1, 3]], [[0, 3], [1, 2]], [[0], [1, 2, 3]], [[0, 1, 2], [3]]]
    for codec in ("none", "fp16"):
        found = [two_level(inputs, op, hosts=hosts, codec=codec)[0] for hosts in partitions]
        flat = allreduce(inputs, op, codec=codec)[0]
        different = [*found[:-1], *([found[-1]] if codec == "fp16" else []), flat]
        assert len({x.tobytes() for x in different}) == len(different)
    # The last rank alone is added last, as in rank order.
    assert np.array_equal(two_level(inputs, op, hosts=[[0, 1, 2], [3]])[0], allreduce(inputs, op)[0])


def test_what_is_no_partition_is_refused() -> None:
    inputs = gaussians(3, 10)
    for hosts in ([], [[0, 1]], [[0, 1], [1, 2]], [[1, 0], [2]], [[2], [0, 1]], [[0, 1, 2], []], [[0, 1], [3]]):
        with pytest.raises(ValueError, match="hosts"):
            two_level(inputs, hosts=hosts)
    with pytest.raises(ValueError, match="intra_codec"):
        two_level(inputs, hosts=[[0, 1], [2]], codec="fp16", intra_codec="bf16")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_combinations_without_a_meaning_are_refused() -> None:
    one, whole = np.ones(3, np.float32), np.ones(3, np.int32)
    cases: list[tuple[list[list[Array]], str, str]] = [
        ([[one], [one[:2]]], "sum", "none"),
        ([[one], [whole]], "sum", "none"),
        ([[whole], [whole]], "mean", "none"),
        ([[whole], [whole]], "sum", "fp16"),
        ([[one], [one]], "max", "fp16"),
    ]
    for inputs, op, codec in cases:
        with pytest.raises(ValueError, match=r"disagree|mean of|codecs take"):
            allreduce(inputs, op, codec=codec)
