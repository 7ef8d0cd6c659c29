// What the library needs of the stand-in CUDA runtime. The runtime is inside a program or an extension whose symbols
// are hidden, so one symbol of it is exported, stand_in_cuda_runtime (runtime_table.cpp), and the library looks for
// that one in everything the process has loaded.
#pragma once
#include "stand_in/state.h"

namespace stand_in_nccl {

struct Runtime {
  decltype(&stand_in::begin) begin;
  decltype(&stand_in::submit) submit;
  decltype(&stand_in::check_range) check_range;
  decltype(&stand_in::start_thread) start_thread;
  decltype(&stand_in::current_device) current_device;
  decltype(&stand_in::physical_device) physical_device;
  decltype(&cudaStreamGetDevice) stream_device;
  decltype(&cudaStreamIsCapturing) is_capturing;
};

const Runtime& runtime();  // ends the process where there is none

}  // namespace stand_in_nccl

extern "C" [[gnu::visibility("default")]] const stand_in_nccl::Runtime* stand_in_cuda_runtime();
