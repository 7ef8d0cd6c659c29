// The passes of the schedules, each alone on one GPU, to be timed: the tile functions of core/tile.h without flags,
// ranks or waits. Nothing here takes part in an all-reduce. Plain C++: no type of CUDA crosses this line.
//
//   pass     reads                                writes              as in
//   encode   tensors                              message 0           give of direct.h and ring.h, put of oneshot.h
//   decode   message 0                            tensors             take of direct.h
//   add      message 0, tensors                   message 1           Ring::add; op sum
//   reduce   messages 0 and 1 of two ranks;       tensors, message 2  Direct::reduce of rank 0 of two; op mean. Codec
//            with codec none tensors, message 1                       none takes its own values from the tensors.
//   cast     tensors                              message 0           cast_kernel() of gpu/native_kernels.h itself, of
//   widen    message 0                            tensors             two ranks, op mean; and widen_kernel()
//   copy     tensors (one)                        message 0           a kernel that copies, with as many CTAs
//   memcpy   tensors (one)                        message 0           cudaMemcpyAsync from device to device
//   empty    nothing                              nothing             a launch
#pragma once
#include <cstdint>
#include <vector>

#include "../core/types.h"

namespace dpcomm {

enum class PassKind : uint8_t { encode, decode, add, reduce, cast, widen, copy, memcpy, empty };

// All memory is on one device and aligned to 16 bytes (tensors of the tile functions: to their element).
struct PassCall {
  PassKind kind = PassKind::encode;
  CodecKind codec = CodecKind::none;
  Dtype dtype = Dtype::float32;  // bfloat16 too for encode and decode; copies move the bytes of any
  std::vector<int64_t> counts;   // [tensor] elements
  // Repetition i works on set i modulo their number: with sets that together exceed the L2 cache, none is found there.
  std::vector<std::vector<uintptr_t>> tensors;   // [set][tensor]
  std::vector<std::vector<uintptr_t>> messages;  // [set][message]
  int64_t message_bytes = 0;                     // of each message: at least pass_message_bytes()
  int64_t slice_bytes = 128 * 1024;              // of a message that one CTA works on at a time, at most
  int ctas = 1;                                  // CTA c takes the slices c, c + ctas, ...
  int repeats = 1;
  uintptr_t stream = 0;  // a cudaStream_t; 0 is the default stream
};

// What a message of these tensors takes: slices one after the other, each rounded up to 128 bytes. For copies the
// tensor's own bytes.
int64_t pass_message_bytes(const PassCall& call);

// Microseconds a repetition by the device's clock, after one untimed run over each set. Returns when all is done.
// Throws Error: argument, unsupported (no kernel of that kind for the codec and dtype), cuda.
double run_pass(const PassCall& call);

const char* name_of(PassKind);

}  // namespace dpcomm
