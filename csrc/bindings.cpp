// The extension. bindings*.cpp are the only files that include pybind11; they hand things on and have no logic of their
// own.
#include "bindings.h"

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/shm_builder.h"
#include "cuda/p2p_call.h"
#include "queue.h"
#if defined(DPCOMM_WITH_CUDA)
#include "cuda/p2p_builder.h"
#endif
#if defined(DPCOMM_WITH_KERNELS)
#include "cuda/passes.h"
#endif

namespace py = pybind11;
using namespace dpcomm;

namespace {

py::object python_error(const Error& e) {
  const py::tuple waiting = py::cast(e.waiting_for);
  return py::module_::import("dpcomm.errors").attr("from_native")(name_of(e.code), e.what(), e.rank, waiting, e.errnum);
}

using Addresses = std::vector<uintptr_t>;
using Counts = std::vector<int64_t>;

Call make_call(const Addresses& addresses, Counts counts, int dtype, int op, int codec, int algorithm, int bucket) {
  if (addresses.size() != counts.size())
    throw Error(Code::internal, "[dpcomm:INTERNAL] addresses and counts differ in length");
  Call call;
  for (const uintptr_t a : addresses) call.addresses.push_back(reinterpret_cast<char*>(a));
  call.counts = std::move(counts);
  call.dtype = Dtype(dtype);
  call.op = Op(op);
  call.codec = CodecKind(codec);
  call.algorithm = Algorithm(algorithm);
  call.bucket = bucket;
  return call;
}

void run(Queue& queue, const Addresses& addresses, Counts counts, int dtype, int op, int codec, int algorithm,
         int bucket) {
  Call call = make_call(addresses, std::move(counts), dtype, op, codec, algorithm, bucket);
  Interrupt interrupt;
  call.interrupted = [&] { return interrupt.pending(); };
  try {
    const py::gil_scoped_release no_gil;
    queue.run(call);
  } catch (const Error&) {
    if (interrupt.error) std::rethrow_exception(interrupt.error);
    throw;
  }
  if (interrupt.error) std::rethrow_exception(interrupt.error);  // the call ended before the abort reached it
}

bool wait(Job& job, double timeout_s) {
  Interrupt interrupt;
  bool done = false;
  {
    const py::gil_scoped_release no_gil;
    double left = timeout_s;
    while (!done && (timeout_s < 0 || left >= 0)) {
      const double nap = timeout_s < 0 || left > 0.1 ? 0.1 : left;
      done = job.wait(nap);
      left -= 0.1;
      if (!done && interrupt.pending()) break;
    }
  }
  if (interrupt.error) std::rethrow_exception(interrupt.error);
  if (done && job.error()) std::rethrow_exception(job.error());
  return done;
}

py::object python_exception(const std::exception_ptr& error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const Error& e) {
    return python_error(e);
  }
  return py::none();
}

std::shared_ptr<Pending> enqueue(Queue& queue, const Addresses& addresses, Counts counts, int dtype, int op, int codec,
                                 int algorithm, int bucket, uintptr_t stream) {
  Call call = make_call(addresses, std::move(counts), dtype, op, codec, algorithm, bucket);
  const py::gil_scoped_release no_gil;
  return queue.enqueue(call, stream);
}

void run_on(Queue& queue, const Addresses& addresses, Counts counts, int dtype, int op, int codec, int algorithm,
            int bucket, uintptr_t stream, double timeout_s) {
  const auto pending = enqueue(queue, addresses, std::move(counts), dtype, op, codec, algorithm, bucket, stream);
  interruptible([&](const auto& ask) { pending->join(stream, timeout_s, ask); });
}

py::dict stats(Queue& queue, bool reset) {
  const Stats s = queue.engine().stats(reset);
  py::dict d;
  d["calls"] = s.calls;
  d["input_bytes"] = s.input_bytes;
  d["wire_bytes"] = s.wire_bytes;
  d["put_s"] = s.put_s;
  d["reduce_s"] = s.reduce_s;
  d["get_s"] = s.get_s;
  d["wait_s"] = s.wait_s;
  d["nonfinite_groups"] = s.nonfinite_groups;
  return d;
}

py::dict describe(Queue& queue) {
  const Description s = queue.engine().describe();
  py::dict d;
  d["engine"] = s.engine;
  d["name"] = s.name;
  d["simd"] = s.simd;
  d["store"] = s.store;
  d["arena_bytes"] = s.arena_bytes;
  d["slots"] = s.slots;
  d["channels"] = s.channels;
  d["slot_bytes"] = s.slot_bytes;
  d["pids"] = s.pids;
  d["sequence"] = s.sequence;
  d["rejected_connections"] = s.rejected_connections;
  d["aside_bytes"] = s.aside_bytes;
  if (!s.hosts.empty()) d["hosts"] = s.hosts, d["intra_codec"] = s.intra_codec;
  if (!s.carrier.empty()) d["carrier"] = s.carrier;
  if (s.device < 0) return d;
  d["device"] = s.device;
  d["device_name"] = s.device_name;
  d["max_ctas"] = s.max_ctas;
  d["arena"] = s.arena;
  d["peers"] = s.peers;
  return d;
}

template <class Bytes>
Bytes fixed_bytes(const std::string& text, const char* what) {
  Bytes bytes;
  if (text.size() != bytes.size())
    throw Error(Code::internal, std::string("[dpcomm:INTERNAL] ") + what + " must have 32 bytes");
  std::copy(text.begin(), text.end(), bytes.begin());
  return bytes;
}

template <class Builder>
std::vector<bool> probe(Builder& builder, const std::vector<std::string>& names) {
  std::vector<Endpoint> endpoints;
  for (const std::string& name : names) endpoints.push_back(fixed_bytes<Endpoint>(name, "an endpoint"));
  const py::gil_scoped_release no_gil;
  return builder.probe(endpoints);
}

template <class Builder>
std::unique_ptr<Queue> finish(Builder& builder, double timeout_s, const std::string& name) {
  const py::gil_scoped_release no_gil;
  return std::make_unique<Queue>(builder.finish(timeout_s, name));
}

// All but the constructor.
template <class Builder>
py::class_<Builder> add_builder(py::module_& m, const char* name) {
  return py::class_<Builder>(m, name)
      .def("endpoint",
           [](const Builder& b) {
             return py::bytes(reinterpret_cast<const char*>(b.endpoint().data()), b.endpoint().size());
           })
      .def("probe", &probe<Builder>, py::arg("endpoints"))
      .def(
          "bind",
          [](Builder& b, const std::string& secret, double timeout_s) {
            const Secret s = fixed_bytes<Secret>(secret, "the secret");
            const py::gil_scoped_release no_gil;
            b.bind(s, timeout_s);
          },
          py::arg("secret"), py::arg("timeout_s"))
      .def("finish", &finish<Builder>, py::arg("timeout_s"), py::arg("name"))
      .def("warnings", &Builder::warnings);
}

std::vector<std::unique_ptr<Queue>> local_group(int nranks, const Wish& wish, double timeout_s, const std::string& simd,
                                                const std::string& name) {
  const py::gil_scoped_release no_gil;
  std::vector<std::unique_ptr<Queue>> group;
  for (auto& engine : local_engines(nranks, wish, timeout_s, simd, name))
    group.push_back(std::make_unique<Queue>(std::move(engine)));
  return group;
}

template <class Enum>
py::dict table(std::initializer_list<Enum> values) {
  py::dict d;
  for (const Enum v : values) d[name_of(v)] = int(v);
  return d;
}

void add_constants(py::module_& m) {
  m.attr("version") = DPCOMM_VERSION;
#if defined(DPCOMM_WITH_CUDA)
  m.attr("cuda_built") = true;
  m.attr("cuda_version") = cuda_version();
#else
  m.attr("cuda_built") = false;
  m.attr("cuda_version") = "";
#endif
  m.attr("LAYOUT") = kLayout;
  m.attr("MAX_RANKS") = kMaxRanks;
  m.attr("MAX_CHANNELS") = kMostChannels;
  m.attr("MAX_CTAS") = kMostCtas;
  m.attr("DTYPES") =
      table({Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16, Dtype::int32, Dtype::int64});
  m.attr("OPS") = table({Op::sum, Op::mean, Op::min, Op::max});
  m.attr("CODECS") = table({CodecKind::none, CodecKind::fp16, CodecKind::bf16});
  m.attr("ALGORITHMS") = table({Algorithm::automatic, Algorithm::direct, Algorithm::oneshot, Algorithm::ring,
                                Algorithm::native, Algorithm::two_level});
}

void add_functions(py::module_& m) {
  m.def("simd", [] {
    int count;
    const Isa* all = isas(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i)
      if (all[i].usable) names.push_back(all[i].name);
    return names;
  });
  m.def(
      "wire_bytes",
      [](int64_t elems, int dtype, int codec, bool native) {
        const int64_t of_a_group = native ? kNativeGroupBytes : group_bytes(Dtype(dtype), CodecKind(codec));
        return (elems + kGroup - 1) / kGroup * of_a_group;
      },
      py::arg("elems"), py::arg("dtype"), py::arg("codec"), py::arg("native") = false);
  m.def(
      "choose_algorithm",
      [](int64_t elems, int dtype, int codec, int nranks, bool network) {
        return int(choose_algorithm((elems + kGroup - 1) / kGroup, Dtype(dtype), CodecKind(codec), nranks,
                                    network ? Reach::network : Reach::memory));
      },
      py::arg("elems"), py::arg("dtype"), py::arg("codec"), py::arg("nranks"), py::arg("network"));
  m.def("local_group", &local_group, py::arg("nranks"), py::arg("wish"), py::arg("timeout_s"), py::arg("simd"),
        py::arg("name"));
}

#if defined(DPCOMM_WITH_KERNELS)
template <class Enum>
void add_enum(py::class_<PassCall>& c, const char* name, Enum PassCall::* member) {
  c.def_property(
      name, [member](const PassCall& call) { return int(call.*member); },
      [member](PassCall& call, int value) { call.*member = Enum(value); });
}

void add_passes(py::module_& m) {
  m.attr("PASSES") = table({PassKind::encode, PassKind::decode, PassKind::add, PassKind::reduce, PassKind::cast,
                            PassKind::widen, PassKind::copy, PassKind::memcpy, PassKind::empty});
  py::class_<PassCall> c(m, "CudaPass");
  c.def(py::init<>())
      .def_readwrite("counts", &PassCall::counts)
      .def_readwrite("tensors", &PassCall::tensors)
      .def_readwrite("messages", &PassCall::messages)
      .def_readwrite("message_bytes", &PassCall::message_bytes)
      .def_readwrite("slice_bytes", &PassCall::slice_bytes)
      .def_readwrite("ctas", &PassCall::ctas)
      .def_readwrite("repeats", &PassCall::repeats)
      .def_readwrite("stream", &PassCall::stream);
  add_enum(c, "kind", &PassCall::kind);
  add_enum(c, "codec", &PassCall::codec);
  add_enum(c, "dtype", &PassCall::dtype);
  m.def("pass_message_bytes", &pass_message_bytes, py::arg("call"));
  m.def("run_pass", &run_pass, py::arg("call"), py::call_guard<py::gil_scoped_release>());
}
#else
void add_passes(py::module_&) {}
#endif

#if defined(DPCOMM_WITH_CUDA)
std::vector<std::unique_ptr<Queue>> p2p_group(const std::vector<int>& devices, const P2pWish& wish, double timeout_s,
                                              const std::string& name) {
  const py::gil_scoped_release no_gil;
  std::vector<std::unique_ptr<Queue>> group;
  for (auto& engine : p2p_local(devices, wish, timeout_s, name))
    group.push_back(std::make_unique<Queue>(std::move(engine)));
  return group;
}

py::list devices() {
  py::list all;
  for (const DeviceInfo& info : cuda_devices()) {
    py::dict d;
    d["ordinal"] = info.ordinal;
    d["name"] = info.name;
    d["uuid"] = info.uuid;
    d["pci_bus_id"] = info.pci_bus_id;
    d["capability"] = info.capability;
    d["sms"] = info.sms;
    all.append(d);
  }
  return all;
}

void add_cuda(py::module_& m) {
  m.def("cuda_reason", &cuda_unusable_reason);
  m.def("cuda_devices", &devices);
  m.def("cuda_device_of", &device_of, py::arg("address"));
  py::class_<P2pWish>(m, "P2pWish")
      .def(py::init([](int64_t arena_bytes, int max_ctas, int slots, int64_t slice_bytes, bool pinned) {
             return P2pWish{arena_bytes, max_ctas, slots, slice_bytes, pinned};
           }),
           py::arg("arena_bytes"), py::arg("max_ctas") = 0, py::arg("slots") = 0, py::arg("slice_bytes") = 0,
           py::arg("pinned") = false);
  m.def("p2p_channels", &p2p_channels, py::arg("device"), py::arg("ranks_here"), py::arg("wish"),
        py::call_guard<py::gil_scoped_release>());
  m.def("p2p_local", &p2p_group, py::arg("devices"), py::arg("wish"), py::arg("timeout_s"), py::arg("name"));
  auto builder = add_builder<P2pBuilder>(m, "P2pBuilder");
  add_passes(m);
  builder.def(py::init<int, int, int, const P2pWish&, int>(), py::arg("rank"), py::arg("nranks"), py::arg("device"),
              py::arg("wish"), py::arg("channels"), py::call_guard<py::gil_scoped_release>());
}
#else
void add_cuda(py::module_& m) {
  add_passes(m);
  m.def("cuda_reason", [] { return "this build has no CUDA: there was no nvcc, or DPCOMM_CUDA=OFF"; });
  m.def("cuda_devices", [] { return py::list(); });
}
#endif

void add_classes(py::module_& m) {
  py::class_<Job, std::shared_ptr<Job>>(m, "Job")
      .def("wait", &wait, py::arg("timeout_s"))
      .def("is_completed", &Job::done)
      .def("exception", [](const Job& job) { return python_exception(job.error()); });

  py::class_<Pending, std::shared_ptr<Pending>>(m, "Pending")
      .def(
          "join",
          [](Pending& p, uintptr_t stream, double timeout_s) {
            interruptible([&](const auto& ask) { p.join(stream, timeout_s, ask); });
          },
          py::arg("stream"), py::arg("timeout_s"))
      .def(
          "synchronize",
          [](Pending& p, double timeout_s) {
            return interruptible([&](const auto& ask) {
              const bool in_time = p.synchronize(timeout_s, ask);
              if (const auto error = p.error()) std::rethrow_exception(error);
              return in_time;
            });
          },
          py::arg("timeout_s"))
      .def("is_completed", &Pending::done, py::call_guard<py::gil_scoped_release>())
      .def("exception", [](Pending& p) {
        std::exception_ptr error;
        {
          const py::gil_scoped_release no_gil;
          error = p.error();
        }
        return python_exception(error);
      });

  py::class_<Queue>(m, "Comm")
      .def_property_readonly("rank", [](Queue& q) { return q.engine().rank(); })
      .def_property_readonly("nranks", [](Queue& q) { return q.engine().nranks(); })
      .def("run", &run, py::arg("addresses"), py::arg("counts"), py::arg("dtype"), py::arg("op"), py::arg("codec"),
           py::arg("algorithm"), py::arg("bucket"))
      .def(
          "submit",
          [](Queue& q, const Addresses& addresses, Counts counts, int dtype, int op, int codec, int algorithm,
             int bucket) {
            Call call = make_call(addresses, std::move(counts), dtype, op, codec, algorithm, bucket);
            const py::gil_scoped_release no_gil;
            return q.submit(std::move(call));
          },
          py::arg("addresses"), py::arg("counts"), py::arg("dtype"), py::arg("op"), py::arg("codec"),
          py::arg("algorithm"), py::arg("bucket"))
      .def("run_on", &run_on, py::arg("addresses"), py::arg("counts"), py::arg("dtype"), py::arg("op"),
           py::arg("codec"), py::arg("algorithm"), py::arg("bucket"), py::arg("stream"), py::arg("timeout_s"))
      .def("enqueue", &enqueue, py::arg("addresses"), py::arg("counts"), py::arg("dtype"), py::arg("op"),
           py::arg("codec"), py::arg("algorithm"), py::arg("bucket"), py::arg("stream"), py::keep_alive<0, 1>())
      .def_property_readonly("device", [](Queue& q) { return q.engine().device(); })
      .def_property_readonly("stream", [](Queue& q) { return q.engine().stream(); })
      .def(
          "check", [](Queue& q) { q.engine().check(); }, py::call_guard<py::gil_scoped_release>())
      .def(
          "abort", [](Queue& q, const std::string& reason) { q.engine().abort(reason); }, py::arg("reason"),
          py::call_guard<py::gil_scoped_release>())
      .def("close", &Queue::close, py::arg("grace_s"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("closed", &Queue::closed)
      .def("stats", &stats, py::arg("reset"))
      .def("describe", &describe);

  py::class_<Wish>(m, "ShmWish")
      .def(py::init([](int64_t arena_bytes, int channels, bool fewer_channels, bool crowded, int slots,
                       int64_t slice_bytes) {
             return Wish{arena_bytes, channels, fewer_channels, crowded, slots, slice_bytes};
           }),
           py::arg("arena_bytes"), py::arg("channels") = 1, py::arg("fewer_channels") = false,
           py::arg("crowded") = false, py::arg("slots") = 0, py::arg("slice_bytes") = 0);

  add_builder<ShmBuilder>(m, "ShmBuilder")
      .def(py::init<int, int, const Wish&, const std::string&>(), py::arg("rank"), py::arg("nranks"), py::arg("wish"),
           py::arg("simd"));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "dpcomm's C++ side; see _native.pyi";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& e) {
      const py::object error = python_error(e);
      PyErr_SetObject(py::type::handle_of(error).ptr(), error.ptr());
    }
  });
  add_constants(m);
  add_functions(m);
  add_cuda(m);
  add_classes(m);
  add_carried(m);
  add_nccl(m);
}
