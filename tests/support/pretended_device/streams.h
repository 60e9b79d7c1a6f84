// Streams, memory and the host of a pretended device, and the order between them that a program has asked for.
//
// Everything runs immediately, in the order of the host's calls. Each stream has a vector clock: `clocks[s][u]` is the
// number of operations of stream u that are completed before the next one of stream s. So an access to memory is a race
// if its stream's clock does not cover the last access of another stream. Streams are compared by storage: disjoint
// views of one storage on two streams are reported too.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>

namespace pretended {
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

DeviceType kind = DeviceType::CUDA;  // of this process, set by `start`
DeviceIndex devices = 1;

// CUDA refuses to work in a fork of a process that has used it, be it to look for devices.
bool is_used = false, in_bad_fork = false;
void use() {
  TORCH_CHECK(!in_bad_fork, "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must "
                            "use the 'spawn' start method");
  is_used = true;
}

// One thread at a time. A thread that waits for another one releases the GIL, which that one needs to record events.
std::recursive_mutex mutex;
struct Lock {
  Lock() {
    if (mutex.try_lock()) return;
    PyThreadState* python = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
    mutex.lock();
    if (python) PyEval_RestoreThread(python);
  }
  ~Lock() { mutex.unlock(); }
};

// ---------------------------------------------------------------------------------------------------------- events
using Callback = void (*)(const char* kind, const char* what);
Callback callback = nullptr;
thread_local int quiet = 0;  // above 0: inside a kernel, whose own copies are no events
int64_t launches = 0;

void event(const char* kind, const std::string& what) {
  if (callback && !quiet) callback(kind, what.c_str());
}

struct Quiet {
  Quiet() { ++quiet; }
  ~Quiet() { --quiet; }
};

// ---------------------------------------------------------------------------------------------------------- clocks
constexpr int kStreams = 256;
constexpr int kPool = kStreams - 1;  // the streams of torch's pool, as one: callbacks of futures run in order
using Clock = std::array<uint64_t, kStreams>;
using Times = std::map<int, uint64_t>;  // by stream
std::array<Clock, kStreams> clocks{};
Clock host{};  // what the host has waited for
int next_stream = 1;
thread_local std::array<int64_t, 8> current_stream{};  // by device
thread_local DeviceIndex current_device = 0;

// The streams in use, few of all; the compiler does not optimize, and each kernel joins two clocks.
template <class Action>
void for_each_stream(Action action) {
  for (int i = 0; i < next_stream; ++i) action(i);
  action(kPool);
}

void join(Clock& into, const Clock& from) {
  for_each_stream([&](int i) {
    if (from[i] > into[i]) into[i] = from[i];
  });
}

bool covers(const Clock& clock, int stream, uint64_t at) { return clock[stream] >= at; }

int new_stream() {
  TORCH_CHECK(next_stream < kPool, "the pretended device has at most ", kPool, " streams");
  return next_stream++;
}

int stream_now() { return static_cast<int>(current_stream[current_device]); }

int stream_of(const Tensor& t) { return static_cast<int>(current_stream[t.device().index()]); }

bool is_ours(const Tensor& t) { return t.defined() && t.device().type() == kind; }

uint64_t launched(int stream) {
  join(clocks[stream], host);  // what the host has waited for is completed before it launches this
  ++launches;
  return ++clocks[stream][stream];
}

// -------------------------------------------------------------------------------------------------- pinned memory
// Asynchronous copies of pinned memory arrive late: one to the host when the host waits for it, until when the memory
// holds garbage. One to the device is made immediately, and its source must not change until the host has waited.
struct PinnedCopy {
  char* memory;
  std::string bytes;  // of the source
  int stream;
  uint64_t at;
  bool to_host;
};
std::map<char*, size_t> pinned;
std::list<PinnedCopy> copies;

bool is_pinned(const void* pointer) {
  Lock lock;
  auto at = pinned.upper_bound(static_cast<char*>(const_cast<void*>(pointer)));
  if (at == pinned.begin()) return false;
  --at;
  return static_cast<const char*>(pointer) < at->first + at->second;
}

void finish(const PinnedCopy& copy) {
  if (copy.to_host)
    memcpy(copy.memory, copy.bytes.data(), copy.bytes.size());
  else if (memcmp(copy.memory, copy.bytes.data(), copy.bytes.size()) != 0)
    event("race", "the host writes pinned memory that is being copied to the device");
}

// Finish the copies that `clock` covers, or those within the given memory.
template <class Predicate>
void finish_if(Predicate done) {
  for (auto copy = copies.begin(); copy != copies.end();)
    if (done(*copy)) {
      finish(*copy);
      copy = copies.erase(copy);
    } else {
      ++copy;
    }
}

void host_waits_for(const Clock& clock, const std::string& what, const char* kind = "wait") {
  join(host, clock);
  finish_if([](const PinnedCopy& c) { return covers(host, c.stream, c.at); });
  event(kind, what);
}

struct PinnedAllocator final : c10::Allocator {
  static void release(void* pointer) {
    Lock lock;
    char* from = static_cast<char*>(pointer);
    char* to = from + pinned[from];
    // torch's allocator keeps the memory until the device has copied it.
    copies.remove_if([&](const PinnedCopy& c) { return c.memory >= from && c.memory < to; });
    pinned.erase(from);
    free(pointer);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = nullptr;
    bytes = std::max<size_t>(bytes, 64);
    TORCH_CHECK(posix_memalign(&pointer, 64, bytes) == 0, "out of memory");
    Lock lock;
    pinned[static_cast<char*>(pointer)] = bytes;
    return {pointer, pointer, &release, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} pinned_allocator;

// -------------------------------------------------------------------------------------------------- device memory
struct Block {
  size_t bytes = 0;
  int stream = 0;  // on which it was allocated, to which it returns
  int write_stream = -1;
  uint64_t write_at = 0;
  Times reads, uses;
  Times before;  // uses of the same memory by other streams before it was freed and allocated anew
  std::set<int> recorded;  // by record_stream: it is not reused until these have finished with it
};
std::unordered_map<void*, Block> blocks;
int64_t live_bytes = 0, peak_bytes = 0;
// Of freed memory that other streams may still use, these uses, by its stream and size: the next allocation of this
// size there gets the same memory, as with torch's allocator.
std::array<std::multimap<size_t, Times>, kStreams> freed;

size_t rounded(size_t bytes) { return (std::max<size_t>(bytes, 1) + 511) / 512 * 512; }

struct DeviceAllocator final : c10::Allocator {
  static void release(void* pointer) {
    Lock lock;
    auto found = blocks.find(pointer);
    if (found != blocks.end()) {
      Block& b = found->second;
      Times later;
      for (auto& [stream, at] : b.uses)
        if (stream != b.stream && !b.recorded.count(stream) && !covers(clocks[b.stream], stream, at) &&
            !covers(host, stream, at))
          later[stream] = at;
      if (!later.empty()) freed[b.stream].emplace(rounded(b.bytes), later);
      live_bytes -= b.bytes;
      blocks.erase(found);
    }
    free(pointer);
  }
  c10::DataPtr allocate(size_t bytes) override {
    use();
    void* pointer = nullptr;
    TORCH_CHECK(posix_memalign(&pointer, 512, std::max<size_t>(bytes, 512)) == 0, "out of memory");
    memset(pointer, 0xCD, bytes);  // uninitialized memory must not look like zeros
    Lock lock;
    Block b;
    b.bytes = bytes;
    b.stream = stream_now();
    if (auto same = freed[b.stream].find(rounded(bytes)); same != freed[b.stream].end()) {
      b.before = same->second;
      freed[b.stream].erase(same);
    }
    blocks[pointer] = b;
    live_bytes += bytes;
    peak_bytes = std::max(peak_bytes, live_bytes);
    return {pointer, pointer, &release, Device(kind, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} device_allocator;

// Record an access by operation number `at` of a stream, and report races.
void touched(const Tensor& t, bool writes, int stream, uint64_t at, const std::string& op) {
  if (!t.has_storage() || !t.storage().data()) return;
  auto found = blocks.find(t.storage().mutable_data());
  if (found == blocks.end()) return;
  Block& b = found->second;
  Clock& mine = clocks[stream];
  auto on = " on stream " + std::to_string(stream);
  auto unordered = [&](int other, uint64_t when) { return other != stream && !covers(mine, other, when); };
  if (b.write_stream >= 0 && unordered(b.write_stream, b.write_at))
    event("race", op + (writes ? " writes" : " reads") + on + " memory that stream " + std::to_string(b.write_stream) +
                      " wrote, without waiting for it");
  if (writes) {
    for (auto& [other, when] : b.reads)
      if (unordered(other, when))
        event("race", op + " writes" + on + " memory that stream " + std::to_string(other) + " may still read");
    for (auto& [other, when] : b.before)
      if (unordered(other, when))
        event("freed too early", op + " writes" + on + " memory that was freed while stream " + std::to_string(other) +
                                     " might still use it (no record_stream, no wait)");
    b.before.clear();
    b.reads.clear();
    b.write_stream = stream;
    b.write_at = at;
  } else {
    b.reads[stream] = at;
  }
  b.uses[stream] = at;
}

// ------------------------------------------------------------------------------------------------------ device guard
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Device whole(Device d) { return Device(kind, d.has_index() ? d.index() : current_device); }
  DeviceType type() const override { return kind; }
  Device getDevice() const override { return Device(kind, current_device); }
  Device exchangeDevice(Device d) const override {
    auto old = getDevice();
    setDevice(d);
    return old;
  }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.index() < devices, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(d);
  }
  void uncheckedSetDevice(Device d) const noexcept override {
    if (d.index() >= 0) current_device = d.index();
  }
  DeviceIndex deviceCount() const noexcept override { return devices; }

  Stream getStream(Device d) const override {
    d = whole(d);
    return Stream(Stream::UNSAFE, d, current_stream[d.index()]);
  }
  Stream getDefaultStream(Device d) const override { return Stream(Stream::UNSAFE, whole(d), 0); }
  Stream getNewStream(Device d, int = 0) const override {
    Lock lock;
    return Stream(Stream::UNSAFE, whole(d), new_stream());
  }
  Stream getStreamFromGlobalPool(Device d, bool = false) const override {
    return Stream(Stream::UNSAFE, whole(d), kPool);
  }
  Stream exchangeStream(Stream s) const override {
    auto old = getStream(s.device());
    current_stream[s.device_index()] = s.id();
    return old;
  }
  void* getStreamNativeHandle(const Stream s) const override { return reinterpret_cast<void*>(s.id()); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream& s) const override {
    Lock lock;
    host_waits_for(clocks[s.id()], "Stream.synchronize");
  }
  void synchronizeDevice(const DeviceIndex) const override {
    Lock lock;
    Clock all{};
    for (auto& clock : clocks) join(all, clock);
    host_waits_for(all, "synchronize");
  }

  // An event has a copy of its stream's clock.
  struct Event {
    Clock clock;
    int stream;
  };
  // Stream `waiter` waits, before its next operation, for operation `at` of stream `of`; it has launched `mine` before.
  struct Wait {
    int waiter, of;
    uint64_t at, mine;
  };
  mutable std::deque<Wait> waits;  // the last ones
  static constexpr size_t kWaits = 1 << 14;

  bool has_more(int stream) const { return !covers(host, stream, clocks[stream][stream]); }
  // Does a device have operations to do that begin after this event?
  bool is_busy_after(const Event& e) const {
    if (!covers(e.clock, e.stream, clocks[e.stream][e.stream])) return true;
    std::set<int> found;  // the first wait that covers the event counts
    for (auto& w : waits)
      if (w.of == e.stream && w.at >= e.clock[e.stream] && found.insert(w.waiter).second)
        if (clocks[w.waiter][w.waiter] > w.mine && has_more(w.waiter)) return true;
    return false;
  }
  void record(void** e, const Stream& s, const DeviceIndex, const c10::EventFlag) const override {
    Lock lock;
    if (!*e) *e = new Event{};
    join(clocks[s.id()], host);
    *static_cast<Event*>(*e) = {clocks[s.id()], static_cast<int>(s.id())};
  }
  void block(void* e, const Stream& s) const override {
    Lock lock;
    if (!e) return;
    auto& mine = clocks[s.id()];
    auto& clock = static_cast<Event*>(e)->clock;
    for_each_stream([&](int of) {
      if (clock[of] > mine[of]) waits.push_back({static_cast<int>(s.id()), of, clock[of], mine[s.id()]});
    });
    while (waits.size() > kWaits) waits.pop_front();
    join(mine, clock);
  }
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* e, const DeviceIndex) const noexcept override { delete static_cast<Event*>(e); }
  void synchronizeEvent(void* e) const override {
    Lock lock;
    if (!e) return;
    auto& found = *static_cast<Event*>(e);
    host_waits_for(found.clock, "Event.synchronize", is_busy_after(found) ? "busy wait" : "wait");
  }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 1.0; }
  void recordDataPtrOnStream(const c10::DataPtr& p, const Stream& s) const override {
    Lock lock;
    if (auto found = blocks.find(p.get()); found != blocks.end())
      found->second.recorded.insert(static_cast<int>(s.id()));
  }
};
}  // namespace pretended
