// What the files of the extension share.
#pragma once
#include <pybind11/pybind11.h>

#include <exception>
#include <type_traits>
#include <utility>
#include <vector>

#include "error.h"
#include "host/control_plane.h"

void add_carried(pybind11::module_& m);  // bindings_carried.cpp
void add_nccl(pybind11::module_& m);     // bindings_nccl.cpp

namespace dpcomm {

namespace py = pybind11;

// Takes the descriptors of all connections, by rank: (control, headers), from here on closed however this ends.
inline std::vector<PeerSockets> own_sockets(const std::vector<std::pair<int, int>>& descriptors) {
  std::vector<PeerSockets> sockets(descriptors.size());
  for (size_t r = 0; r < descriptors.size(); ++r) {
    sockets[r].control = UniqueFd(descriptors[r].first);
    sockets[r].headers = UniqueFd(descriptors[r].second);
  }
  return sockets;
}

// Python's own exception (Ctrl-C), carried over C++ frames that know nothing of it.
struct Interrupt {
  std::exception_ptr error;

  // Asked by waits every 100 ms.
  bool pending() {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() == 0) return false;
    error = std::make_exception_ptr(py::error_already_set());
    return true;
  }
};

// Runs body(interrupted) without the GIL; what Ctrl-C raises wins.
template <class Body>
auto interruptible(Body body) {
  Interrupt interrupt;
  const auto raise = [&] {
    if (interrupt.error) std::rethrow_exception(interrupt.error);
  };
  const auto without_gil = [&] {
    const py::gil_scoped_release no_gil;
    return body([&] { return interrupt.pending(); });
  };
  try {
    if constexpr (std::is_void_v<decltype(without_gil())>) {
      without_gil();
      raise();
    } else {
      const auto result = without_gil();
      raise();
      return result;
    }
  } catch (const Error&) {
    raise();
    throw;
  }
}

}  // namespace dpcomm
