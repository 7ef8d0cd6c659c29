// The arithmetic of an all-reduce: in rank order, rounded to the type of the elements after each step, as a ring of
// NCCL does at each hop.
#include <cstring>
#include <type_traits>

#include "core/portable.h"
#include "state.h"

namespace stand_in_nccl {
namespace {

template <class T>
struct Plain {
  using Stored = T;
  using Value = T;
  static T load(T x) { return x; }
  static T store(T x) { return x; }
};

struct Half {
  using Stored = uint16_t;
  using Value = float;
  static float load(uint16_t x) { return dpcomm::half_value(x); }
  static uint16_t store(float x) { return dpcomm::half_bits(x); }
};

struct Brain {
  using Stored = uint16_t;
  using Value = float;
  static float load(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // To nearest, ties to even.
  static uint16_t store(float x) {
    if (x != x) return 0x7fc0;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

template <class Value>
Value combine(RedOp op, Value a, Value b) {
  // Whole numbers wrap around.
  using Whole = std::conditional_t<std::is_integral_v<Value>, std::make_unsigned<Value>, std::type_identity<Value>>;
  using Wide = std::conditional_t<std::is_integral_v<Value>, uint64_t, typename Whole::type>;
  switch (op) {
    case RedOp::sum:
    case RedOp::avg:
      return Value(Wide(a) + Wide(b));
    case RedOp::prod:
      return Value(Wide(a) * Wide(b));
    case RedOp::max:
      return a < b ? b : a;
    case RedOp::min:
      return b < a ? b : a;
  }
  die("no operation %d", int(op));
}

// The mean of real numbers multiplies what comes in, that of whole numbers divides what comes out, towards zero.
template <class Element>
void reduce_as(const std::vector<Part*>& parts) {
  using Value = typename Element::Value;
  using Stored = typename Element::Stored;
  constexpr bool whole = std::is_integral_v<Value>;
  const size_t count = parts[0]->count;
  const RedOp op = parts[0]->op;
  const auto rounded = [](Value x) { return Element::load(Element::store(x)); };
  const Value scale = whole ? Value(1) : rounded(Value(1) / Value(parts.size()));
  const auto contribution = [&](const Part& part, size_t i) {
    Stored stored;
    std::memcpy(&stored, static_cast<const Stored*>(part.from) + i, sizeof stored);
    const Value x = Element::load(stored);
    return !whole && op == RedOp::avg ? rounded(x * scale) : x;
  };
  std::vector<Stored> result(count);
  for (size_t i = 0; i < count; ++i) {
    Value sum = contribution(*parts[0], i);
    for (size_t r = 1; r < parts.size(); ++r) sum = rounded(combine(op, sum, contribution(*parts[r], i)));
    if (whole && op == RedOp::avg) sum = Value(sum / Value(parts.size()));
    result[i] = Element::store(sum);
  }
  for (const Part* part : parts) std::memcpy(part->to, result.data(), count * sizeof(Stored));
}

}  // namespace

void reduce(const std::vector<Part*>& parts) {
  switch (parts[0]->type) {
    case DataType::int8:
      return reduce_as<Plain<int8_t>>(parts);
    case DataType::uint8:
      return reduce_as<Plain<uint8_t>>(parts);
    case DataType::int32:
      return reduce_as<Plain<int32_t>>(parts);
    case DataType::uint32:
      return reduce_as<Plain<uint32_t>>(parts);
    case DataType::int64:
      return reduce_as<Plain<int64_t>>(parts);
    case DataType::uint64:
      return reduce_as<Plain<uint64_t>>(parts);
    case DataType::float16:
      return reduce_as<Half>(parts);
    case DataType::float32:
      return reduce_as<Plain<float>>(parts);
    case DataType::float64:
      return reduce_as<Plain<double>>(parts);
    case DataType::bfloat16:
      return reduce_as<Brain>(parts);
  }
}

}  // namespace stand_in_nccl
