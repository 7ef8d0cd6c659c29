// The kernels around NCCL's own all-reduce in 16 bits on a machine without a GPU: the same bodies (csrc/core/native.h),
// played by one host lane.
#include "gpu/native_kernels.h"

#include "core/native.h"
#include "stand_in.h"

namespace dpcomm {

namespace {

struct OneLane {
  template <class Codec>
  static constexpr int vectors = kGroup / kVec;  // a whole group
  uint64_t* nonfinite_groups;

  int index() const { return 0; }
  int count() const { return 1; }
  Uniform<int32_t> group_max(Uniform<int32_t> m) const { return m; }
  template <class T>
  void push(T* to, const Vec<T>& v) const {
    store(to, v);
  }
  void nonfinite_group() const { __atomic_fetch_add(nonfinite_groups, 1, __ATOMIC_RELAXED); }
};

template <class Codec, bool back>
void play(const NativeLaunch& launch) {
  OneLane lane{launch.nonfinite_groups};
  if constexpr (back)
    widen<Codec>(lane, bucket_of(launch.bucket), range_of(launch), launch.codes);
  else
    cast<Codec>(lane, bucket_of(launch.bucket), range_of(launch), launch.nranks, launch.codes);
}

template <class Codec, bool back>
const void* key() {
  static const char only = 0;
  static const bool known = [] {
    const auto body = [](void** parameters, unsigned cta, unsigned) {
      if (cta == 0) play<Codec, back>(*static_cast<const NativeLaunch*>(parameters[0]));
    };
    stand_in::register_kernel(&only, body, kCtaThreads, sizeof(NativeLaunch));
    return true;
  }();
  return known ? &only : nullptr;
}

}  // namespace

const void* cast_kernel(Dtype dtype, CodecKind codec) {
  return with_native_codec(dtype, codec, [](auto c) { return key<decltype(c), false>(); });
}
const void* widen_kernel(Dtype dtype, CodecKind codec) {
  return with_native_codec(dtype, codec, [](auto c) { return key<decltype(c), true>(); });
}

}  // namespace dpcomm
