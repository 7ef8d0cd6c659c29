// Kernels of the passes and their launcher. One CTA works like one channel of the p2p kernel: 512 lanes, one vector of
// eight elements each at a time.
#include <string>

#include "../gpu/cuda_check.h"
#include "../gpu/native_kernels.h"
#include "passes.h"
#include "passes_kernel.h"

namespace dpcomm {

namespace {

constexpr int kThreads = 512;
constexpr int64_t kMessageAlign = 128;

// CtaLanes for work that waits for nobody and counts nothing.
struct PassLanes {
  template <class Codec>
  static constexpr int vectors = 1;
  static_assert(kGroup == 32 * kVec, "group_max is a reduction over one warp");

  __device__ int index() const { return int(threadIdx.x); }
  __device__ int count() const { return int(blockDim.x); }
  __device__ int32_t group_max(int32_t m) const { return __reduce_max_sync(~0u, m); }
  template <class T>
  __device__ void push(T* to, const Vec<T>& v) const {
    store(to, v);
  }
  __device__ void nonfinite_group() const {}
};

template <PassKind kind, class Codec>
__global__ void __launch_bounds__(kThreads, 1) pass(const __grid_constant__ PassArguments a) {
  PassLanes lanes;
  run_channel<kind, Codec>(lanes, a, int(blockIdx.x), int(gridDim.x));
}

// Four loads of 16 bytes are on their way before the first store.
__global__ void __launch_bounds__(kThreads, 1) copy_vectors(uint4* to, const uint4* from, int64_t vectors) {
  constexpr int kDeep = 4;
  const int64_t lanes = int64_t{gridDim.x} * blockDim.x;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + (kDeep - 1) * lanes < vectors; i += kDeep * lanes) {
    uint4 held[kDeep];
    DPCOMM_UNROLL
    for (int k = 0; k < kDeep; ++k) held[k] = from[i + k * lanes];
    DPCOMM_UNROLL
    for (int k = 0; k < kDeep; ++k) to[i + k * lanes] = held[k];
  }
  for (; i < vectors; i += lanes) to[i] = from[i];
}

__global__ void __launch_bounds__(kThreads, 1) nothing() {}

using Kernel = void (*)(PassArguments);

template <class Codec>
Kernel kernel_of(PassKind kind) {
  if (kind == PassKind::encode) return pass<PassKind::encode, Codec>;
  if (kind == PassKind::decode) return pass<PassKind::decode, Codec>;
  if constexpr (std::is_same_v<typename Codec::Element, Float32>) {  // a sample is enough: each costs build time
    if (kind == PassKind::add) return pass<PassKind::add, Codec>;
    if (kind == PassKind::reduce) return pass<PassKind::reduce, Codec>;
  }
  return nullptr;
}

bool is_native(PassKind kind) { return kind == PassKind::cast || kind == PassKind::widen; }

const void* choose_tile_kernel(const PassCall& call) {
  if (call.codec == CodecKind::bf16) return nullptr;
  Kernel kernel = nullptr;
  const bool none = call.codec == CodecKind::none;
  if (call.dtype == Dtype::float32)
    kernel = none ? kernel_of<None<Float32>>(call.kind) : kernel_of<Fp16<Float32>>(call.kind);
  if (call.dtype == Dtype::bfloat16)
    kernel = none ? kernel_of<None<Bfloat16>>(call.kind) : kernel_of<Fp16<Bfloat16>>(call.kind);
  return reinterpret_cast<const void*>(kernel);
}

const void* choose_kernel(const PassCall& call) {
  const void* kernel = call.kind == PassKind::cast    ? cast_kernel(call.dtype, call.codec)
                       : call.kind == PassKind::widen ? widen_kernel(call.dtype, call.codec)
                                                      : choose_tile_kernel(call);
  if (kernel == nullptr)
    throw Error(Code::unsupported,
                std::string("pass ") + name_of(call.kind) +
                    " has no kernel for this dtype and codec. Use float32; encode and decode have bfloat16 too. cast "
                    "and widen have codecs fp16 and bf16, the others none and fp16.");
  return kernel;
}

bool is_copy(PassKind kind) { return kind == PassKind::copy || kind == PassKind::memcpy; }

size_t messages_of(PassKind kind) {
  switch (kind) {
    case PassKind::encode:
    case PassKind::decode:
    case PassKind::cast:
    case PassKind::widen:
    case PassKind::copy:
    case PassKind::memcpy:
      return 1;
    case PassKind::add:
      return 2;
    case PassKind::reduce:
      return 3;
    case PassKind::empty:
      return 0;
  }
  return 0;
}

int64_t groups_in(const std::vector<int64_t>& counts) {
  int64_t groups = 0;
  for (const int64_t n : counts) groups += groups_of(n);
  return groups;
}

// Groups of a slice at most, and bytes from one slice's message to the next.
struct Layout {
  int64_t most, stride, slices;
};

Layout layout_of(const PassCall& call) {
  const bool native = is_native(call.kind);
  const int64_t bytes = native ? kNativeGroupBytes : group_bytes(call.dtype, call.codec);
  const int64_t groups = groups_in(call.counts);
  const int64_t most =
      native ? groups : most_groups(call.slice_bytes, call.slice_bytes, bytes);  // native has no slices
  const Chunks chunks = Chunks::cut(groups, 1, most);
  return {most, (chunks.slice_groups * bytes + kMessageAlign - 1) / kMessageAlign * kMessageAlign, chunks.slices};
}

void require(bool ok, const char* what) {
  if (!ok) throw Error(Code::argument, std::string("run_pass: ") + what);
}

void check_shape(const PassCall& call) {
  require(call.kind <= PassKind::empty && call.codec <= CodecKind::bf16 && call.dtype <= Dtype::int64,
          "kind, codec or dtype is unknown.");
  require(call.ctas >= 1 && call.ctas <= 65535 && call.repeats >= 1, "ctas and repeats must be at least 1.");
  require(call.slice_bytes >= 1, "slice_bytes must be at least 1.");
  if (call.kind == PassKind::empty) return;
  require(!call.tensors.empty() && call.tensors.size() == call.messages.size(),
          "there must be as many sets of tensors as of messages, and at least one.");
  for (const auto& set : call.tensors) require(set.size() == call.counts.size(), "each tensor needs a count.");
  for (const auto& set : call.messages) require(set.size() == messages_of(call.kind), "wrong number of messages.");
  for (const int64_t n : call.counts) require(n >= 1, "counts must be at least 1.");
  require(!call.counts.empty() && (!is_copy(call.kind) || call.counts.size() == 1),
          "at least one tensor is needed; a copy has exactly one.");
  require(!is_copy(call.kind) || call.counts[0] * element_bytes(call.dtype) % 16 == 0,
          "a copy moves a multiple of 16 bytes.");
  require(call.message_bytes >= pass_message_bytes(call), "the messages are too small: see pass_message_bytes().");
}

// The one device that holds all memory. A wrong address would kill the context, so the driver is asked for each.
int device_of(const PassCall& call) {
  int device = -1;
  const auto check = [&](uintptr_t address, int64_t align) {
    cudaPointerAttributes at{};
    check_cuda(cudaPointerGetAttributes(&at, reinterpret_cast<void*>(address)), "cudaPointerGetAttributes");
    require(at.type == cudaMemoryTypeDevice, "all tensors and messages must be device memory.");
    require(device < 0 || at.device == device, "all tensors and messages must be on one device.");
    require(address % uintptr_t(align) == 0,
            "tensors must be aligned to their element, copies and messages to 16 bytes.");
    device = at.device;
  };
  for (const auto& set : call.tensors)
    for (const uintptr_t address : set) check(address, is_copy(call.kind) ? 16 : element_bytes(call.dtype));
  for (const auto& set : call.messages)
    for (const uintptr_t address : set) check(address, 16);
  return device;
}

std::vector<Segment> segment_tables(const PassCall& call) {
  std::vector<Segment> table;
  for (const auto& set : call.tensors) {
    int64_t groups = 0;
    for (size_t s = 0; s < set.size(); ++s) {
      table.push_back({reinterpret_cast<char*>(set[s]), call.counts[s], groups});
      groups += groups_of(call.counts[s]);
    }
  }
  return table;
}

// A pass made ready: launch(i) puts repetition i on the stream. kernel: null for copies and empty launches.
class Passes {
 public:
  Passes(const PassCall& call, const void* kernel)
      : call_(call),
        stream_(reinterpret_cast<cudaStream_t>(call.stream)),
        kernel_(kernel),
        segments_(kernel ? segment_tables(call) : std::vector<Segment>(1)),
        layout_(layout_of(call)),
        groups_(groups_in(call.counts)) {}

  size_t sets() const { return call_.kind == PassKind::empty ? 1 : call_.tensors.size(); }

  void launch(size_t i) const {
    const size_t set = i % sets();
    const unsigned ctas = unsigned(call_.ctas);
    if (call_.kind == PassKind::empty) {
      nothing<<<ctas, kThreads, 0, stream_>>>();
    } else if (is_copy(call_.kind)) {
      copy(ctas, call_.messages[set][0], call_.tensors[set][0]);
    } else {
      is_native(call_.kind) ? around_native(ctas, set) : slices(ctas, set);
    }
    check_cuda(cudaGetLastError(), "launching a pass");
  }

 private:
  void slices(unsigned ctas, size_t set) const {
    const int64_t count = int64_t(call_.counts.size());
    PassArguments a{segments_.data() + int64_t(set) * count, count, groups_, layout_.most, layout_.stride, {}};
    for (size_t m = 0; m < call_.messages[set].size(); ++m)
      a.messages[m] = reinterpret_cast<char*>(call_.messages[set][m]);
    start(ctas, &a);
  }
  void around_native(unsigned ctas, size_t set) const {
    const int64_t count = int64_t(call_.counts.size());
    const BucketTable table{count, groups_, segments_.data() + int64_t(set) * count, {}};
    uint16_t* const codes = reinterpret_cast<uint16_t*>(call_.messages[set][0]);
    NativeLaunch a{table, layout_.most, 0, codes, 2, nonfinite_groups_.data()};
    start(ctas, &a);
  }
  void start(unsigned ctas, void* arguments) const {
    check_cuda(cudaLaunchKernel(kernel_, dim3(ctas), dim3(kThreads), &arguments, 0, stream_), "cudaLaunchKernel");
  }
  void copy(unsigned ctas, uintptr_t to, uintptr_t from) const {
    const int64_t bytes = call_.counts[0] * element_bytes(call_.dtype);
    if (call_.kind == PassKind::memcpy)
      check_cuda(cudaMemcpyAsync(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size_t(bytes),
                                 cudaMemcpyDeviceToDevice, stream_),
                 "cudaMemcpyAsync");
    else
      copy_vectors<<<ctas, kThreads, 0, stream_>>>(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4*>(from),
                                                   bytes / 16);
  }

  const PassCall& call_;
  cudaStream_t stream_;
  const void* kernel_;
  DeviceArray<Segment> segments_;  // [set][tensor]
  DeviceArray<uint64_t> nonfinite_groups_{1};
  Layout layout_;
  int64_t groups_;
};

// A point in a stream.
class StreamEvent {
 public:
  explicit StreamEvent(cudaStream_t stream) : stream_(stream) {
    check_cuda(cudaEventCreate(&event_), "cudaEventCreate");
  }
  ~StreamEvent() { cudaEventDestroy(event_); }
  StreamEvent(const StreamEvent&) = delete;
  StreamEvent& operator=(const StreamEvent&) = delete;
  void record() const { check_cuda(cudaEventRecord(event_, stream_), "cudaEventRecord"); }
  double us_since(const StreamEvent& earlier) const {
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, earlier.event_, event_), "cudaEventElapsedTime");
    return double(ms) * 1e3;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t event_ = nullptr;
};

}  // namespace

int64_t pass_message_bytes(const PassCall& call) {
  if (call.kind == PassKind::empty) return 0;
  if (is_copy(call.kind)) return call.counts.empty() ? 0 : call.counts[0] * element_bytes(call.dtype);
  const Layout layout = layout_of(call);
  return layout.slices * layout.stride;
}

double run_pass(const PassCall& call) {
  check_shape(call);
  const bool tiles = call.kind != PassKind::empty && !is_copy(call.kind);
  const void* const kernel = tiles ? choose_kernel(call) : nullptr;
  const int device = device_of(call);  // -1: an empty launch, on the current one
  std::unique_ptr<CurrentDevice> current;
  if (device >= 0) current = std::make_unique<CurrentDevice>(device);
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(call.stream);
  check_cuda(cudaStreamSynchronize(stream),
             "cudaStreamSynchronize before a pass (an error of earlier work shows here)");
  const Passes passes(call, kernel);
  check_cuda(cudaDeviceSynchronize(),
             "cudaDeviceSynchronize before a pass");  // the tables were written on another stream
  for (size_t i = 0; i < passes.sets(); ++i) passes.launch(i);
  const StreamEvent begin(stream), end(stream);
  begin.record();
  for (int i = 0; i < call.repeats; ++i) passes.launch(size_t(i));
  end.record();
  check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize after a pass");
  return end.us_since(begin) / call.repeats;
}

const char* name_of(PassKind kind) {
  switch (kind) {
    case PassKind::encode:
      return "encode";
    case PassKind::decode:
      return "decode";
    case PassKind::add:
      return "add";
    case PassKind::reduce:
      return "reduce";
    case PassKind::cast:
      return "cast";
    case PassKind::widen:
      return "widen";
    case PassKind::copy:
      return "copy";
    case PassKind::memcpy:
      return "memcpy";
    case PassKind::empty:
      return "empty";
  }
  return "?";
}

}  // namespace dpcomm
