// The loopback kernel and its launcher: CTA r of one cooperative launch plays rank r. Arenas lie in device memory and
// are used as between GPUs: messages are pushed into the reader's arena, which he polls (Team::shared is false).
#include <algorithm>
#include <cmath>

#include "../core/codec_fp16.h"
#include "../core/codec_none.h"
#include "cuda_check.h"
#include "lanes.cuh"
#include "loopback.h"

namespace dpcomm {

namespace {

constexpr int kThreads = 512;  // 16 groups at once; 128 registers each, so one CTA of it fits on every SM

// All that a launch is told. Everything that changes from call to call lies in the mailboxes.
struct Loopback {
  Mailbox* const* box;
  const Segment* segments;  // [rank][segment]
  int64_t count, groups;    // of one rank's bucket
  uint64_t* failure;
  unsigned long long* nonfinite_groups;
  uint64_t timeout_ns;
  int64_t slot_bytes;
  int slots, absent_rank, disagreeing_rank;
  Header header;  // without its sequence number
};

template <class Codec, Algorithm algorithm>
__global__ void __launch_bounds__(kThreads, 1) loopback(const __grid_constant__ Loopback a) {
  const int rank = int(blockIdx.x);
  if (rank == a.absent_rank) return;
  const Team team{rank, int(gridDim.x), a.box, a.failure, a.slots, a.slot_bytes, a.slot_bytes, false};
  const Bucket bucket{a.segments + rank * a.count, a.count, a.groups};
  Mailbox& mine = *a.box[rank];
  Header header = a.header;
  header.sequence = mine.sequence + 1;
  if (rank == a.disagreeing_rank) ++header.bucket;
  CtaLanes lanes{a.failure, a.nonfinite_groups, a.timeout_ns, uint32_t(header.sequence), rank};
  if (!lanes.sync(load_acquire(a.failure) == 0)) return;  // a call before this one failed; all lanes decide alike
  if (lanes.index() == 0) mine.sequence = header.sequence;
  // What they return is said again by the failure word, which the host reads.
  if constexpr (algorithm == Algorithm::direct)
    direct<Codec>(lanes, team, bucket, header);
  else if constexpr (algorithm == Algorithm::oneshot)
    oneshot<Codec>(lanes, team, bucket, header);
  else
    ring<Codec>(lanes, team, bucket, header);
}

using Kernel = void (*)(Loopback);

template <class Codec>
Kernel kernel_of(Algorithm algorithm) {
  if (algorithm == Algorithm::ring) return loopback<Codec, Algorithm::ring>;
  return algorithm == Algorithm::oneshot ? loopback<Codec, Algorithm::oneshot> : loopback<Codec, Algorithm::direct>;
}

// A sample of the core is enough for a check: the fewer kernels, the shorter every build.
Kernel choose_kernel(const LoopbackCall& call) {
  if (call.dtype == Dtype::float32 && call.codec == CodecKind::fp16 && (call.op == Op::sum || call.op == Op::mean))
    return kernel_of<Fp16<Float32>>(call.algorithm);
  if (call.dtype == Dtype::float32 && call.codec == CodecKind::none) return kernel_of<None<Float32>>(call.algorithm);
  if (call.dtype == Dtype::bfloat16 && call.codec == CodecKind::none && call.algorithm == Algorithm::direct)
    return loopback<None<Bfloat16>, Algorithm::direct>;
  throw Error(Code::unsupported,
              "the loopback has no kernel for this combination. Use float32 with codec none, sums and means of float32 "
              "with fp16, or bfloat16 with codec none and algorithm direct.");
}

void check_arguments(const LoopbackCall& call) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) throw Error(Code::argument, std::string("loopback: ") + what);
  };
  const size_t nranks = call.addresses.size();
  require(nranks >= 1 && nranks <= size_t(kMaxRanks), "1 to 64 ranks are possible.");
  for (const auto& segments : call.addresses)
    require(segments.size() == call.counts.size(), "each rank needs one address per count.");
  for (const int64_t n : call.counts) require(n >= 0, "counts must not be negative.");
  require(call.algorithm != Algorithm::automatic && call.algorithm <= Algorithm::ring, "an algorithm must be named.");
  require(call.op <= Op::max, "unknown operation.");
  require(call.timeout_s > 0 && std::isfinite(call.timeout_s), "timeout_s must be a positive number of seconds.");
  require(call.slots >= 4 && (call.slots & (call.slots - 1)) == 0, "slots must be a power of two of at least 4.");
  require(call.slot_bytes % 128 == 0 && call.slot_bytes >= group_bytes(call.dtype, call.codec),
          "slot_bytes must be a multiple of 128 and hold a group.");
  require(call.calls >= 1, "calls must be at least 1.");
}

// The one device that holds all segments. A wrong address would kill the context, so the driver is asked for each.
int device_of(const LoopbackCall& call) {
  int device = -1;
  for (const auto& segments : call.addresses) {
    for (size_t s = 0; s < segments.size(); ++s) {
      if (call.counts[s] == 0) continue;
      cudaPointerAttributes at{};
      check_cuda(cudaPointerGetAttributes(&at, reinterpret_cast<void*>(segments[s])), "cudaPointerGetAttributes");
      if (at.type != cudaMemoryTypeDevice)
        throw Error(Code::argument, "loopback: every segment must be device memory.");
      if (device >= 0 && at.device != device)
        throw Error(Code::argument, "loopback: all segments must be on one device.");
      if (segments[s] % uintptr_t(element_bytes(call.dtype)) != 0)
        throw Error(Code::argument, "loopback: segments must be aligned to their element.");
      device = at.device;
    }
  }
  return std::max(device, 0);
}

// CTAs that wait for each other must all be running: refuse rather than hang.
void check_residency(Kernel kernel, int device, int nranks) {
  int per_sm = 0, sms = 0, cooperative = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, 0),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  check_cuda(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), "cudaDeviceGetAttribute");
  if (!cooperative) throw Error(Code::unsupported, "loopback: this device has no cooperative launch.");
  if (int64_t{per_sm} * sms < nranks)
    throw Error(Code::unsupported, "loopback: " + std::to_string(nranks) +
                                       " ranks need as many CTAs at once, and this device holds " +
                                       std::to_string(int64_t{per_sm} * sms) + ". Use fewer ranks.");
}

std::vector<Segment> segment_table(const LoopbackCall& call, int64_t* groups) {
  std::vector<Segment> table;
  for (const auto& addresses : call.addresses) {
    *groups = 0;
    for (size_t s = 0; s < addresses.size(); ++s) {
      table.push_back({reinterpret_cast<char*>(addresses[s]), call.counts[s], *groups});
      *groups += groups_of(call.counts[s]);
    }
    if (addresses.empty()) table.push_back({nullptr, 0, 0});
  }
  return table;
}

Header make_header(const LoopbackCall& call) {
  Header header{};
  for (const int64_t n : call.counts) header.numel += n;
  header.tensors = int32_t(call.counts.size());
  header.bucket = -1;
  header.op = uint8_t(call.op);
  header.dtype = uint8_t(call.dtype);
  header.codec = uint8_t(call.codec);
  header.algorithm = uint8_t(call.algorithm);
  return header;
}

// The arenas of all ranks in one piece of memory, every message counter at call.first_message.
class Arenas {
 public:
  Arenas(const LoopbackCall& call, int nranks)
      : bytes_((arena_bytes(nranks, call.slots, call.slot_bytes, false) + 4095) / 4096 * 4096),
        memory_(size_t(bytes_ * nranks)),
        box_(start(call, nranks)) {}
  Mailbox* const* box() const { return box_.data(); }

 private:
  std::vector<Mailbox*> start(const LoopbackCall& call, int nranks) const {
    std::vector<Mailbox> image(1);
    for (auto& writers : image[0].arrived)
      for (Flag& flag : writers) flag.value = call.first_message;
    for (uint32_t& sent : image[0].sent) sent = call.first_message;
    std::vector<Mailbox*> box;
    for (int r = 0; r < nranks; ++r) {
      char* const at = memory_.data() + r * bytes_;
      DeviceArray<char>::write(at, image);
      box.push_back(reinterpret_cast<Mailbox*>(at));
    }
    return box;
  }

  int64_t bytes_;  // of one arena
  DeviceArray<char> memory_;
  DeviceArray<Mailbox*> box_;
};

Error error_of(const Failure& f, double timeout_s) {
  const std::string call = " in call " + std::to_string(f.sequence) + ".";
  switch (f.cause) {
    case Cause::timeout: {
      Error error(Code::timeout, "loopback: rank " + std::to_string(f.rank) + " waited " + std::to_string(timeout_s) +
                                     " s for rank " + std::to_string(f.other) + call);
      error.waiting_for = {f.other};
      return error;
    }
    case Cause::mismatch:
      return Error(Code::mismatch, "loopback: ranks " + std::to_string(f.rank) + " and " + std::to_string(f.other) +
                                       " announce different headers (field " + std::to_string(int(f.field)) + ")" +
                                       call);
    case Cause::none:
    case Cause::peer_closed:
    case Cause::peer_died:
    case Cause::aborted:
    case Cause::internal:
      break;
  }
  return Error(Code::internal, "loopback: unexpected cause " + std::to_string(int(f.cause)) + call);
}

}  // namespace

LoopbackResult loopback_allreduce(const LoopbackCall& call) {
  check_arguments(call);
  const int nranks = int(call.addresses.size());
  const Kernel kernel = choose_kernel(call);
  const int device = device_of(call);
  const CurrentDevice current(device);
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize before the launch (an error of earlier work shows here)");
  if (nranks == 1) return {0, 0};
  check_residency(kernel, device, nranks);

  int64_t groups = 0;
  const std::vector<Segment> table = segment_table(call, &groups);
  const DeviceArray<Segment> segments(table);
  const Arenas arenas(call, nranks);
  const DeviceArray<uint64_t> failure(1);
  const DeviceArray<unsigned long long> nonfinite_groups(1);
  const uint64_t timeout_ns = uint64_t(std::min(call.timeout_s * 1e9, 9e18));
  Loopback arguments{arenas.box(),     segments.data(),       int64_t(table.size()) / nranks,
                     groups,           failure.data(),        nonfinite_groups.data(),
                     timeout_ns,       call.slot_bytes,       call.slots,
                     call.absent_rank, call.disagreeing_rank, make_header(call)};
  void* parameters[] = {&arguments};
  const Event begin, end;
  begin.record();
  for (int i = 0; i < call.calls; ++i)
    check_cuda(cudaLaunchCooperativeKernel(kernel, dim3(unsigned(nranks)), dim3(kThreads), parameters, 0, nullptr),
               "cudaLaunchCooperativeKernel");
  end.record();
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize after the launch");
  check_cuda(cudaGetLastError(), "cudaGetLastError after the launch");
  if (const uint64_t word = failure.read()[0]; word != 0) throw error_of(unpack(word), call.timeout_s);
  return {end.us_since(begin) / call.calls, int64_t(nonfinite_groups.read()[0])};
}

std::string cuda_version() {
  int version = 0;
  check_cuda(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string cuda_unusable_reason() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  cudaGetLastError();
  if (status != cudaSuccess) return std::string("cudaGetDeviceCount: ") + cudaGetErrorString(status);
  return devices > 0 ? "" : "cudaGetDeviceCount: no device";
}

}  // namespace dpcomm
