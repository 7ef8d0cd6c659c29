// What NCCL adds up itself: values of codec none, and on request 16-bit codes, between a kernel that casts and one that
// widens. All of it is on the engine's stream, where nothing else is to do meanwhile.
#include <algorithm>

#include "../gpu/native_kernels.h"
#include "../host/call_facts.h"
#include "engine.h"

namespace dpcomm {

namespace {

constexpr int kCtasOfSm = 4;  // as many threads as an SM holds: the kernels only move memory

nccl::DataType nccl_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return nccl::DataType::float32;
    case Dtype::float64:
      return nccl::DataType::float64;
    case Dtype::float16:
      return nccl::DataType::float16;
    case Dtype::bfloat16:
      return nccl::DataType::bfloat16;
    case Dtype::int32:
      return nccl::DataType::int32;
    case Dtype::int64:
      return nccl::DataType::int64;
  }
  return nccl::DataType::uint8;
}

nccl::RedOp nccl_op(Op op) {
  switch (op) {
    case Op::sum:
      return nccl::RedOp::sum;
    case Op::mean:
      return nccl::RedOp::avg;
    case Op::min:
      return nccl::RedOp::min;
    case Op::max:
      return nccl::RedOp::max;
  }
  return nccl::RedOp::sum;
}

}  // namespace

// NCCL's minima and maxima of real numbers lose NaNs.
bool NcclEngine::adds_up(const Call& call) {
  const bool real = call.dtype != Dtype::int32 && call.dtype != Dtype::int64;
  return served_natively(call) && (call.op <= Op::mean || !real);
}

// Nothing beats NCCL's own all-reduce where no codec makes less of the bytes.
bool NcclEngine::steps_aside(const Call& call) {
  const bool open = call.algorithm == Algorithm::automatic && call.codec == CodecKind::none && adds_up(call);
  return open || call.algorithm == Algorithm::native;
}

Arrival NcclEngine::add_natively(const Flight& flight) {
  carrier_->begin(false);  // nothing of this call is beside the steps: a call that breaks off has nothing to wait for
  try {
    if (flight.call.codec == CodecKind::none)
      add_values(flight.call);
    else
      add_codes(flight);
  } catch (const NcclCommunicator::Broken& error) {
    return {Arrival::Kind::broken, -1, error.what()};
  }
  return {};
}

void NcclEngine::add_values(const Call& call) {
  comm_->group(
      [&](const nccl::Api& api, nccl::Comm comm) {
        for (size_t i = 0; i < call.counts.size(); ++i)
          if (call.counts[i] > 0)
            comm_->took(api.AllReduce(call.addresses[i], call.addresses[i], size_t(call.counts[i]),
                                      nccl_type(call.dtype), nccl_op(call.op), comm, stream_.get()),
                        "ncclAllReduce");
      },
      [this] { return given_up(); });
}

// All slots are one message here; a bucket that does not fit takes several.
void NcclEngine::add_codes(const Flight& flight) {
  const Call& call = flight.call;
  const nccl::DataType type = call.codec == CodecKind::fp16 ? nccl::DataType::float16 : nccl::DataType::bfloat16;
  uint16_t* const codes = reinterpret_cast<uint16_t*>(memory_->scratch.all());
  const int64_t groups = flight.table.groups;
  if (groups == 0) return;
  const int64_t most = memory_->native_bytes / kNativeGroupBytes;
  const Chunks slices = Chunks::cut(groups, 1, most);
  const int most_ctas = asked_ctas_ > 0 ? asked_ctas_ : most_ctas_ * kCtasOfSm;
  NativeLaunch pass{flight.table, most, 0, codes, call.op == Op::mean ? nranks() : 1, memory_->nonfinite_groups.data()};
  for (; pass.slice < slices.slices; ++pass.slice) {
    const Range range = slices.range(pass.slice, 0);
    const int ctas = ctas_of(range.groups, most_ctas);
    launch(cast_kernel(call.dtype, call.codec), ctas, &pass);
    comm_->group(
        [&](const nccl::Api& api, nccl::Comm comm) {
          comm_->took(
              api.AllReduce(codes, codes, size_t(range.groups * kGroup), type, nccl::RedOp::sum, comm, stream_.get()),
              "ncclAllReduce");
        },
        [this] { return given_up(); });
    launch(widen_kernel(call.dtype, call.codec), ctas, &pass);
  }
}

}  // namespace dpcomm
