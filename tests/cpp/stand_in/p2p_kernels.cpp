// The p2p kernels on a machine without a GPU: the same body (csrc/cuda/p2p_kernel.h), a CTA is a thread with one lane.
#include "cuda/p2p_kernels.h"

#include "cuda/p2p_kernel.h"
#include "stand_in.h"

namespace dpcomm {

namespace {

struct HereLanes {
  static constexpr bool puts_off = false;
  template <class Codec>
  static constexpr int vectors = Codec::scaled ? kGroup / kVec : 8;
  DeviceWait patience;
  uint64_t* nonfinite_groups;

  int index() const { return 0; }
  int count() const { return 1; }
  bool sync(bool ok) const { return ok; }
  bool wait(const Flag* flag, uint32_t value, int peer) const { return patience(flag, value, peer); }
  void post(Flag* flag, uint32_t value) const { store_release(&flag->value, value); }
  Uniform<int32_t> group_max(Uniform<int32_t> m) const { return m; }
  template <class T>
  void push(T* to, const Vec<T>& v) const {
    store(to, v);
  }
  void phase(Phase) const {}
  void nonfinite_group() const { __atomic_fetch_add(nonfinite_groups, 1, __ATOMIC_RELAXED); }
};

template <class Codec, Algorithm algorithm>
const void* kernel() {
  static const char key = 0;
  static const bool known = [] {
    const auto body = [](void** parameters, unsigned cta, unsigned) {
      play_p2p<Codec, algorithm>(
          *static_cast<const P2pCall*>(parameters[0]), int(cta),
          [](const DeviceWait& wait, uint64_t* nonfinite_groups) { return HereLanes{wait, nonfinite_groups}; });
    };
    stand_in::register_kernel(&key, body, kCtaThreads, sizeof(P2pCall));
    return true;
  }();
  return known ? &key : nullptr;
}

template <class Codec>
const void* kernel_of(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::direct:
      return kernel<Codec, Algorithm::direct>();
    case Algorithm::oneshot:
      return kernel<Codec, Algorithm::oneshot>();
    case Algorithm::ring:
      return kernel<Codec, Algorithm::ring>();
    case Algorithm::automatic:
    case Algorithm::native:
    case Algorithm::two_level:
      return nullptr;
  }
  return nullptr;
}

// Sanitizers take minutes to compile all codings; they get what the engine's own code needs.
#if defined(STAND_IN_FEW)
template <class Codec>
const void* unless_few(Algorithm) {
  return nullptr;
}
#else
template <class Codec>
const void* unless_few(Algorithm algorithm) {
  return kernel_of<Codec>(algorithm);
}
#endif

}  // namespace

const void* p2p_kernel_float(Dtype dtype, Algorithm algorithm) {
  return dtype == Dtype::float32 ? kernel_of<None<Float32>>(algorithm) : unless_few<None<Float64>>(algorithm);
}

const void* p2p_kernel_half(Dtype dtype, Algorithm algorithm) {
  return dtype == Dtype::float16 ? unless_few<None<Float16>>(algorithm) : unless_few<None<Bfloat16>>(algorithm);
}

const void* p2p_kernel_whole(Dtype dtype, Algorithm algorithm) {
  return dtype == Dtype::int32 ? kernel_of<None<Int32>>(algorithm) : unless_few<None<Int64>>(algorithm);
}

const void* p2p_kernel_fp16(Dtype dtype, Algorithm algorithm) {
  if (dtype == Dtype::float32) return kernel_of<Fp16<Float32>>(algorithm);
  if (dtype == Dtype::float16) return unless_few<Fp16<Float16>>(algorithm);
  if (dtype == Dtype::bfloat16) return unless_few<Fp16<Bfloat16>>(algorithm);
  return nullptr;
}

}  // namespace dpcomm
