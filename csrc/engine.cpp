#include "engine.h"

namespace dpcomm {

std::shared_ptr<Pending> Engine::enqueue(const Call&, uintptr_t) {
  throw Error(Code::internal, "[dpcomm:INTERNAL] this engine has no streams: use allreduce()");
}

const char* name_of(Op op) {
  switch (op) {
    case Op::sum:
      return "sum";
    case Op::mean:
      return "mean";
    case Op::min:
      return "min";
    case Op::max:
      return "max";
  }
  return "?";
}
const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return "float32";
    case Dtype::float64:
      return "float64";
    case Dtype::float16:
      return "float16";
    case Dtype::bfloat16:
      return "bfloat16";
    case Dtype::int32:
      return "int32";
    case Dtype::int64:
      return "int64";
  }
  return "?";
}
const char* name_of(CodecKind codec) {
  switch (codec) {
    case CodecKind::none:
      return "none";
    case CodecKind::fp16:
      return "fp16";
    case CodecKind::bf16:
      return "bf16";
  }
  return "?";
}
const char* name_of(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::automatic:
      return "auto";
    case Algorithm::direct:
      return "direct";
    case Algorithm::oneshot:
      return "oneshot";
    case Algorithm::ring:
      return "ring";
    case Algorithm::two_level:
      return "two_level";
    case Algorithm::native:
      return "native";
  }
  return "?";
}

std::string Call::text() const {
  int64_t elems = 0;
  for (const int64_t n : counts) elems += n;
  std::string text = std::string("allreduce(") + name_of(op) + ", " + name_of(dtype) + ", " + std::to_string(elems);
  if (counts.size() > 1) text += " in " + std::to_string(counts.size()) + " tensors";
  if (codec != CodecKind::none) text += std::string(", ") + name_of(codec);
  if (bucket >= 0) text += ", bucket " + std::to_string(bucket);
  return text + ")";
}

}  // namespace dpcomm
