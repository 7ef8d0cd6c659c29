// The only file that includes pybind11. It hands things on and has no logic of its own.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/shm_builder.h"
#include "queue.h"
#if defined(DPCOMM_WITH_CUDA)
#include "cuda/loopback.h"
#endif

namespace py = pybind11;
using namespace dpcomm;

namespace {

py::object python_error(const Error& e) {
  const py::tuple waiting = py::cast(e.waiting_for);
  return py::module_::import("dpcomm.errors").attr("from_native")(name_of(e.code), e.what(), e.rank, waiting, e.errnum);
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

py::object exception(const Job& job) {
  try {
    if (job.error()) std::rethrow_exception(job.error());
  } catch (const Error& e) {
    return python_error(e);
  }
  return py::none();
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
  d["simd"] = s.simd;
  d["store"] = s.store;
  d["arena_bytes"] = s.arena_bytes;
  d["slots"] = s.slots;
  d["channels"] = s.channels;
  d["slot_bytes"] = s.slot_bytes;
  d["pids"] = s.pids;
  d["sequence"] = s.sequence;
  d["rejected_connections"] = s.rejected_connections;
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

std::vector<bool> probe(ShmBuilder& builder, const std::vector<std::string>& names) {
  std::vector<Endpoint> endpoints;
  for (const std::string& name : names) endpoints.push_back(fixed_bytes<Endpoint>(name, "an endpoint"));
  const py::gil_scoped_release no_gil;
  return builder.probe(endpoints);
}

std::unique_ptr<Queue> finish(ShmBuilder& builder, double timeout_s, const std::string& name) {
  const py::gil_scoped_release no_gil;
  return std::make_unique<Queue>(builder.finish(timeout_s, name));
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
  m.attr("DTYPES") =
      table({Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16, Dtype::int32, Dtype::int64});
  m.attr("OPS") = table({Op::sum, Op::mean, Op::min, Op::max});
  m.attr("CODECS") = table({CodecKind::none, CodecKind::fp16});
  m.attr("ALGORITHMS") = table({Algorithm::automatic, Algorithm::direct, Algorithm::oneshot, Algorithm::ring});
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
      [](int64_t elems, int dtype, int codec) {
        return (elems + kGroup - 1) / kGroup * group_bytes(Dtype(dtype), CodecKind(codec));
      },
      py::arg("elems"), py::arg("dtype"), py::arg("codec"));
  m.def(
      "choose_algorithm",
      [](int64_t elems, int dtype, int codec, int nranks) {
        return int(choose_algorithm((elems + kGroup - 1) / kGroup, Dtype(dtype), CodecKind(codec), nranks));
      },
      py::arg("elems"), py::arg("dtype"), py::arg("codec"), py::arg("nranks"));
  m.def("local_group", &local_group, py::arg("nranks"), py::arg("wish"), py::arg("timeout_s"), py::arg("simd"),
        py::arg("name"));
}

#if defined(DPCOMM_WITH_CUDA)
template <class Enum>
void add_enum(py::class_<LoopbackCall>& c, const char* name, Enum LoopbackCall::* member) {
  c.def_property(
      name, [member](const LoopbackCall& call) { return int(call.*member); },
      [member](LoopbackCall& call, int value) { call.*member = Enum(value); });
}

void add_cuda(py::module_& m) {
  py::class_<LoopbackCall> c(m, "LoopbackCall");
  c.def(py::init<>())
      .def_readwrite("addresses", &LoopbackCall::addresses)
      .def_readwrite("counts", &LoopbackCall::counts)
      .def_readwrite("timeout_s", &LoopbackCall::timeout_s)
      .def_readwrite("slots", &LoopbackCall::slots)
      .def_readwrite("slot_bytes", &LoopbackCall::slot_bytes)
      .def_readwrite("first_message", &LoopbackCall::first_message)
      .def_readwrite("calls", &LoopbackCall::calls)
      .def_readwrite("absent_rank", &LoopbackCall::absent_rank)
      .def_readwrite("disagreeing_rank", &LoopbackCall::disagreeing_rank);
  add_enum(c, "dtype", &LoopbackCall::dtype);
  add_enum(c, "op", &LoopbackCall::op);
  add_enum(c, "codec", &LoopbackCall::codec);
  add_enum(c, "algorithm", &LoopbackCall::algorithm);
  m.def("cuda_reason", &cuda_unusable_reason);
  m.def(
      "loopback_allreduce",
      [](const LoopbackCall& call) {
        const py::gil_scoped_release no_gil;
        const LoopbackResult r = loopback_allreduce(call);
        return std::make_pair(r.us, r.nonfinite_groups);
      },
      py::arg("call"));
}
#else
void add_cuda(py::module_& m) {
  m.def("cuda_reason", [] { return "this build has no CUDA: there was no nvcc, or DPCOMM_CUDA=OFF"; });
}
#endif

void add_classes(py::module_& m) {
  py::class_<Job, std::shared_ptr<Job>>(m, "Job")
      .def("wait", &wait, py::arg("timeout_s"))
      .def("is_completed", &Job::done)
      .def("exception", &exception);

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
      .def("check", [](Queue& q) { q.engine().check(); })
      .def(
          "abort", [](Queue& q, const std::string& reason) { q.engine().abort(reason); }, py::arg("reason"))
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

  py::class_<ShmBuilder>(m, "ShmBuilder")
      .def(py::init<int, int, const Wish&, const std::string&>(), py::arg("rank"), py::arg("nranks"), py::arg("wish"),
           py::arg("simd"))
      .def("endpoint",
           [](const ShmBuilder& b) {
             return py::bytes(reinterpret_cast<const char*>(b.endpoint().data()), b.endpoint().size());
           })
      .def("probe", &probe, py::arg("endpoints"))
      .def(
          "bind",
          [](ShmBuilder& b, const std::string& secret, double timeout_s) {
            const Secret s = fixed_bytes<Secret>(secret, "the secret");
            const py::gil_scoped_release no_gil;
            b.bind(s, timeout_s);
          },
          py::arg("secret"), py::arg("timeout_s"))
      .def("finish", &finish, py::arg("timeout_s"), py::arg("name"))
      .def("warnings", &ShmBuilder::warnings);
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
}
