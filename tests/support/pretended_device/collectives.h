// A stand-in for NCCL, by gloo on the same memory, and gloo for device tensors as CUDA builds have it.
//
// It raises where NCCL does: tensors on the host, with gaps, or of other dtypes. Collectives are ordered by streams:
// those with async_op=True run in a stream of their own, and `wait` makes the current stream wait and not the host.
// gloo copies device tensors by way of the host, which waits.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

#include <atomic>

#include "kernels.h"
#include "streams.h"

namespace pretended {
using Tensors = std::vector<Tensor>;

struct Handle final : c10d::Work {
  Clock clock{};  // of the collective's stream, after it
  Tensors tensors;
  c10::intrusive_ptr<c10::ivalue::Future> future;
  Handle(int rank, c10d::OpType type) : c10d::Work(rank, type) {}
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  Tensors result() override { return tensors; }
  void blockCurrentStream() override { wait(c10d::kUnsetTimeout); }
  void synchronize() override { wait(c10d::kUnsetTimeout); }
  bool wait(std::chrono::milliseconds) override {
    Lock lock;
    if (!tensors.empty()) join(clocks[stream_of(tensors[0])], clock);
    return true;
  }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future; }
};

struct Collectives final : c10d::Backend {
  c10::intrusive_ptr<c10d::Backend> gloo;
  c10::intrusive_ptr<Options> options;
  bool is_nccl;
  int own_stream;
  std::atomic<int> inside{0};

  Collectives(c10::intrusive_ptr<c10d::Backend> g, bool nccl, std::chrono::milliseconds timeout)
      : c10d::Backend(g->getRank(), g->getSize()), gloo(std::move(g)), is_nccl(nccl) {
    options = c10::make_intrusive<Options>("pretended", timeout);
    Lock lock;
    own_stream = new_stream();
  }
  const std::string getBackendName() const override { return "pretended"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options; }
  bool supportsCoalescing() const override { return false; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }

  void check(const Tensor& t, const char* what) {
    static const std::set<c10::ScalarType> known = {
        at::kByte, at::kChar,     at::kBool,  at::kInt,    at::kLong,          at::kHalf,
        at::kBFloat16, at::kFloat, at::kDouble, at::kFloat8_e4m3fn, at::kFloat8_e5m2};
    TORCH_CHECK_WITH(TypeError, is_ours(t), "No backend type associated with device type ", t.device().type(), " (",
                     what, ")");
    TORCH_CHECK(t.is_non_overlapping_and_dense(), "Tensors must be contiguous (", what, ")");
    TORCH_CHECK_WITH(TypeError, !is_nccl || known.count(t.scalar_type()), "Unconvertible NCCL type ", t.scalar_type(),
                     " (", what, ")");
  }

  // Run the collective `f` of gloo, which reads and writes these tensors.
  template <class F>
  c10::intrusive_ptr<c10d::Work> run(c10d::OpType type, const char* what, bool async, const Tensors& reads,
                                     const Tensors& writes, F f) {
    for (auto& t : reads) check(t, what);
    for (auto& t : writes) check(t, what);
    auto work = c10::make_intrusive<Handle>(rank_, type);
    work->tensors = writes.empty() ? reads : writes;
    int on = 0;
    {
      Lock lock;
      if (inside++) event("race", std::string("two threads in collectives of one communicator: ") + what);
      int current = work->tensors.empty() ? 0 : stream_of(work->tensors[0]);
      on = async && is_nccl ? own_stream : current;
      if (on != current) {
        join(clocks[current], host);
        join(clocks[on], clocks[current]);
      }
      uint64_t at = launched(on);
      for (auto& t : reads) touched(t, false, on, at, what);
      for (auto& t : writes) touched(t, true, on, at, what);
      if (is_nccl)
        event("collective", what);
      else
        host_waits_for(clocks[on], std::string("gloo on the device: ") + what);
      work->clock = clocks[on];
    }
    {
      Quiet q;
      f()->wait();
    }
    --inside;
    complete(*work, on);
    return work;
  }

  // Complete the future in the stream of the collective, whose event those that wait for it wait for.
  static void complete(Handle& work, int stream) {
    Guard guard;
    std::vector<Device> on;
    if (!work.tensors.empty()) on.push_back(work.tensors[0].device());
    auto list = c10::ListType::create(c10::TensorType::get());
    work.future = c10::make_intrusive<c10::ivalue::Future>(list, on);
    auto old = guard.exchangeStream(Stream(Stream::UNSAFE, on.empty() ? guard.getDevice() : on[0], stream));
    work.future->markCompleted(c10::IValue(work.tensors));
    guard.exchangeStream(old);
  }

  static Tensors on_host(const Tensors& ts) {
    Tensors out;
    for (auto& t : ts) out.push_back(on_host(t));
    return out;
  }
  static Tensor on_host(const Tensor& t) { return as_cpu(t); }

  // gloo has no average.
  template <class Opts, class F>
  c10::intrusive_ptr<c10d::Work> averaged(const Opts& o, const Tensors& outputs, F f) {
    auto summed = o;
    bool average = o.reduceOp == c10d::ReduceOp::AVG;
    if (average) summed.reduceOp = c10d::ReduceOp::SUM;
    auto work = f(summed);
    if (average) {
      work->wait();
      for (auto t : outputs) t.div_(size_);
    }
    return work;
  }

  c10::intrusive_ptr<c10d::Work> broadcast(Tensors& ts, const c10d::BroadcastOptions& o) override {
    auto c = on_host(ts);
    return run(c10d::OpType::BROADCAST, "broadcast", o.asyncOp, ts, ts, [&] { return gloo->broadcast(c, o); });
  }
  c10::intrusive_ptr<c10d::Work> allreduce(Tensors& ts, const c10d::AllreduceOptions& o) override {
    auto c = on_host(ts);
    return run(c10d::OpType::ALLREDUCE, "all_reduce", o.asyncOp, ts, ts,
               [&] { return averaged(o, c, [&](auto& sum) { return gloo->allreduce(c, sum); }); });
  }
  c10::intrusive_ptr<c10d::Work> allreduce_coalesced(Tensors& ts, const c10d::AllreduceCoalescedOptions& o) override {
    auto c = on_host(ts);
    return run(c10d::OpType::COALESCED, "all_reduce_coalesced", o.asyncOp, ts, ts,
               [&] { return gloo->allreduce_coalesced(c, o); });
  }
  c10::intrusive_ptr<c10d::Work> reduce(Tensors& ts, const c10d::ReduceOptions& o) override {
    auto c = on_host(ts);
    return run(c10d::OpType::REDUCE, "reduce", o.asyncOp, ts, ts, [&] { return gloo->reduce(c, o); });
  }
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<Tensors>& outs, Tensors& ins,
                                           const c10d::AllgatherOptions& o) override {
    std::vector<Tensors> to{on_host(outs[0])};
    auto from = on_host(ins);
    return run(c10d::OpType::ALLGATHER, "all_gather", o.asyncOp, ins, outs[0],
               [&] { return gloo->allgather(to, from, o); });
  }
  c10::intrusive_ptr<c10d::Work> _allgather_base(Tensor& out, Tensor& in, const c10d::AllgatherOptions& o) override {
    auto to = on_host(out), from = on_host(in);
    return run(c10d::OpType::_ALLGATHER_BASE, "all_gather_into_tensor", o.asyncOp, {in}, {out},
               [&] { return gloo->_allgather_base(to, from, o); });
  }
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(Tensor& out, Tensor& in,
                                                      const c10d::ReduceScatterOptions& o) override {
    auto to = on_host(out), from = on_host(in);
    return run(c10d::OpType::_REDUCE_SCATTER_BASE, "reduce_scatter_tensor", o.asyncOp, {in}, {out}, [&] {
      return averaged(o, {to}, [&](auto& sum) { return gloo->_reduce_scatter_base(to, from, sum); });
    });
  }
  c10::intrusive_ptr<c10d::Work> alltoall_base(Tensor& out, Tensor& in, std::vector<int64_t>& to_sizes,
                                               std::vector<int64_t>& from_sizes,
                                               const c10d::AllToAllOptions& o) override {
    auto to = on_host(out), from = on_host(in);
    return run(c10d::OpType::ALLTOALL_BASE, "all_to_all_single", o.asyncOp, {in}, {out},
               [&] { return gloo->alltoall_base(to, from, to_sizes, from_sizes, o); });
  }
  c10::intrusive_ptr<c10d::Work> send(Tensors& ts, int to, int tag) override {
    auto c = on_host(ts);
    return run(c10d::OpType::SEND, "send", false, ts, {}, [&] { return gloo->send(c, to, tag); });
  }
  c10::intrusive_ptr<c10d::Work> recv(Tensors& ts, int from, int tag) override {
    auto c = on_host(ts);
    return run(c10d::OpType::RECV, "recv", false, {}, ts, [&] { return gloo->recv(c, from, tag); });
  }
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& o) override {
    return run(c10d::OpType::BARRIER, "barrier", false, {}, {}, [&] { return gloo->barrier(o); });
  }
};
}  // namespace pretended

// DistributedDataParallel measures its buckets by a timer of the device.
namespace c10d {
struct PretendedTimer final : Timer {
  explicit PretendedTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, PretendedTimer)
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kXPU, PretendedTimer)
}  // namespace c10d
