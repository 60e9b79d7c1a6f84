// Kernels of a pretended device: the CPU's, on the same memory, with what a device would refuse, wait for or reorder.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <unordered_set>

#include "streams.h"

namespace pretended {
using c10::DispatchKey;
using c10::DispatchKeySet;
using Dtype = std::optional<c10::ScalarType>;

// Operations that wait for the device on CUDA, besides copies and item().
const std::unordered_set<std::string> kWaits = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::equal", "aten::is_nonzero", "aten::_linalg_eigh", "aten::linalg_eigh",
    "aten::linalg_cholesky_ex", "aten::repeat_interleave", "aten::histc", "aten::_linalg_svd", "aten::linalg_lstsq",
    "aten::multinomial"};
// Operations whose floating-point results depend on the order of atomic additions.
const std::unordered_set<std::string> kUnordered = {
    "aten::bincount", "aten::scatter_add", "aten::scatter_add_", "aten::index_add", "aten::index_add_",
    "aten::scatter_reduce", "aten::scatter_reduce_", "aten::histc", "aten::put_", "aten::_index_put_impl_"};
const std::unordered_set<std::string> kIndexing = {"aten::index", "aten::index_put_", "aten::index_put",
                                                   "aten::_index_put_impl_"};

DispatchKey key() {
  return kind == DeviceType::CUDA ? DispatchKey::CUDA : kind == DeviceType::MPS ? DispatchKey::MPS : DispatchKey::XPU;
}

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(kind != DeviceType::MPS || (dtype != at::kDouble && dtype != at::kComplexDouble),
                   "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                   "Please use float32 instead.");
}

// ------------------------------------------------------------------------------------------------------ generators
struct Dice final : c10::GeneratorImpl {
  static constexpr uint64_t kSalt = 0x5DEECE66DULL;  // a seed gives other numbers than on a CPU, as on real devices
  at::Generator inner;
  uint64_t seed_ = c10::default_rng_seed_val;
  explicit Dice(DeviceIndex i)
      : c10::GeneratorImpl(Device(kind, i), DispatchKeySet(key())), inner(at::detail::createCPUGenerator()) {
    set_current_seed(seed_);
  }
  void set_current_seed(uint64_t s) override {
    seed_ = s;
    inner.set_current_seed(s ^ kSalt);
  }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_state(const c10::TensorImpl& s) override { inner.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Dice* clone_impl() const override {
    auto* other = new Dice(device_.index());
    other->seed_ = seed_;
    other->inner = inner.clone();
    return other;
  }
  static const at::Generator& standard() {
    static at::Generator g = at::make_generator<Dice>(0);
    return g;
  }
};

// ---------------------------------------------------------------------------------------- allocation, copies, views
// A CPU tensor in the same memory. If an operation resizes it, its storage moves, see `follow_resizes`.
Tensor as_cpu(const Tensor& t) {
  c10::DataPtr memory(t.storage().mutable_data(), Device(DeviceType::CPU));
  c10::Storage s(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(memory),
                 c10::GetAllocator(DeviceType::CPU), true);
  auto impl = c10::make_intrusive<c10::TensorImpl>(std::move(s), DispatchKeySet(DispatchKey::CPU), t.dtype());
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  Tensor out(std::move(impl));
  if (t.is_conj()) out._set_conj(true);
  if (t.is_neg()) out._set_neg(true);
  return out;
}

Tensor empty(c10::IntArrayRef size, Dtype dtype, std::optional<c10::Layout> layout, std::optional<Device> device,
             std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(c10::layout_or_default(layout) == c10::kStrided, "only strided tensors are pretended");
  auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &device_allocator, DispatchKeySet(key()), type, format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, Dtype dtype, std::optional<c10::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &device_allocator, DispatchKeySet(key()), type);
}

char* data_of(const Tensor& t) {
  return static_cast<char*>(t.storage().mutable_data()) + t.storage_offset() * t.itemsize();
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  bool into = is_ours(self), from = is_ours(source);
  check_dtype(self.scalar_type());
  if (self.numel() == 0) return self;
  Lock lock;
  int stream = stream_of(into ? self : source);
  uint64_t at = launched(stream);
  if (from) touched(source, false, stream, at, "copy_");
  if (into) touched(self, true, stream, at, "copy_");
  auto copy = [&] {
    Quiet q;
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor a = into ? as_cpu(self) : self, b = from ? as_cpu(source) : source;
    a.copy_(b);
  };
  if (into && from) {
    copy();
    return self;
  }
  const Tensor& there = into ? source : self;
  bool pin = is_pinned(there.storage().data());
  std::string what = std::string(into ? "copy to the device, " : "copy to the host, ") + std::to_string(self.nbytes()) +
                     " bytes" + (pin ? ", pinned" : ", pageable");
  // A copy of this stream, or of one that it has waited for, has arrived before this one begins.
  if (pin) finish_if([&](const PinnedCopy& c) { return c.to_host && covers(clocks[stream], c.stream, c.at); });
  // An asynchronous copy from pageable memory is staged, so it arrives before this call returns.
  bool late = non_blocking && pin && there.is_contiguous();
  copy();
  if (late) {
    char* memory = data_of(there);
    copies.push_back({memory, std::string(memory, there.nbytes()), stream, at, from});
    if (from) memset(memory, 0xCD, there.nbytes());
  }
  if (non_blocking && (pin || into))
    event("async copy", what);
  else
    host_waits_for(clocks[stream], what);
  return self;
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  Tensor t = target;
  return copy_(t, source, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

c10::Scalar item(const Tensor& self) {
  {
    Lock lock;
    int stream = stream_of(self);
    touched(self, false, stream, launched(stream), "item");
    host_waits_for(clocks[stream], "item");
  }
  return at::native::_local_scalar_dense_cpu(self);
}

void record_stream(Tensor& self, Stream s) { Guard().recordDataPtrOnStream(self.storage().data_ptr(), s); }

Tensor& set_storage(Tensor& self, c10::Storage s, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(s), offset, size, stride);
}

Tensor& set_whole(Tensor& self, c10::Storage s) {
  auto n = static_cast<int64_t>(s.nbytes() / self.itemsize());
  return set_storage(self, std::move(s), 0, n, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& self) {
  return set_storage(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, &device_allocator, true), 0, {0}, {});
}

// -------------------------------------------------------------------------------------------------- all other kernels
// One call of an operation: its arguments become the CPU's, and its results the device's.
struct Call {
  const std::string name;
  std::vector<std::pair<Tensor, Tensor>> pairs;  // a tensor of the device, and its CPU alias
  std::vector<const void*> memory;               // of each pair
  std::vector<Tensor> on_host;                   // arguments that are CPU tensors
  std::optional<Device> device;

  Tensor alias(const Tensor& t) {
    if (!is_ours(t)) {
      if (t.defined() && t.device().is_cpu()) on_host.push_back(t);
      return t;
    }
    TORCH_CHECK(!device || *device == t.device(),
                "Expected all tensors to be on the same device, but found at least two devices, ", *device, " and ",
                t.device(), "! (", name, ")");
    check_dtype(t.scalar_type());
    device = t.device();
    for (auto& [ours, cpu] : pairs)
      if (ours.is_same(t)) return cpu;
    pairs.emplace_back(t, as_cpu(t));
    memory.push_back(t.storage().data());
    return pairs.back().second;
  }

  c10::IValue argument(const c10::IValue& value, const std::string& parameter) {
    if (value.isTensor()) return alias(value.toTensor());
    if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(alias(t));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional<Tensor>(alias(*t)) : t);
      return list;
    }
    if (value.isGenerator()) {
      auto g = value.toGenerator();
      TORCH_CHECK(g.device().type() == kind, "Expected a '", kind, "' device type for generator but found '",
                  g.device().type(), "'");
      return static_cast<Dice*>(g.unsafeGetGeneratorImpl())->inner;
    }
    if (value.isNone() && parameter == "generator")
      return static_cast<Dice*>(Dice::standard().unsafeGetGeneratorImpl())->inner;
    if (value.isDevice() && value.toDevice().type() == kind) {
      if (!device) device = value.toDevice();
      return Device(DeviceType::CPU);
    }
    return value;
  }

  // CPU tensors may be numbers, or indices, which are copied to the device while the host waits.
  void check_on_host(const std::vector<c10::IValue>& arguments, bool masks) {
    bool indexes = kIndexing.count(name);
    for (const Tensor& t : on_host) {
      if (t.dim() == 0 && !indexes) continue;
      bool is_value = t.dim() == 0 && arguments.size() > 2 && arguments[2].isTensor() &&
                      arguments[2].toTensor().is_same(t);
      if (is_value && masks) continue;  // x[mask] = number becomes masked_fill_
      TORCH_CHECK(is_value || (indexes && !t.is_floating_point()),
                  "Expected all tensors to be on the same device, but found at least two devices, ",
                  Device(kind, current_device), " and cpu! (when checking an argument of ", name, ")");
      host_waits_for(clocks[stream_now()], (is_value ? "x[index] = number" : "x[index on the host]") +
                                               std::string(", copied to the device (") + name + ")");
    }
  }

  // Masks as indices: nonzero is called for them, except where x[mask] = number.
  bool has_masks() const {
    if (!kIndexing.count(name)) return false;
    for (auto& [ours, cpu] : pairs)
      if ((ours.scalar_type() == at::kBool || ours.scalar_type() == at::kByte) && !ours.is_same(pairs[0].first))
        return true;
    return false;
  }

  // Give the device's tensors the sizes of CPU aliases that the operation resized.
  void follow_resizes() {
    Quiet q;
    for (size_t i = 0; i < pairs.size(); ++i) {
      auto& [ours, cpu] = pairs[i];
      if (cpu.storage().data() == memory[i] && cpu.sizes() == ours.sizes()) continue;
      if (ours.storage().nbytes() < cpu.storage().nbytes())
        at::native::resize_bytes_cpu(ours.storage().unsafeGetStorageImpl(), cpu.storage().nbytes());
      ours.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
      if (cpu.storage().data() != ours.storage().data())
        memcpy(ours.storage().mutable_data(), cpu.storage().data(), cpu.storage().nbytes());
    }
  }

  // An argument, a view of one, or a new tensor.
  Tensor result(const Tensor& t, int stream, uint64_t at) {
    if (!t.defined() || !t.device().is_cpu()) return t;
    for (auto& [ours, cpu] : pairs)
      if (cpu.is_same(t)) return ours;
    for (auto& [ours, cpu] : pairs)
      if (t.storage().data() && t.storage().data() == cpu.storage().data())
        return ours.as_strided(t.sizes(), t.strides(), t.storage_offset());
    for (auto& h : on_host)
      if (h.is_same(t)) return t;
    check_dtype(t.scalar_type());
    Quiet q;
    Tensor out = at::detail::empty_strided_generic(t.sizes(), t.strides(), &device_allocator, DispatchKeySet(key()),
                                                   t.scalar_type());
    as_cpu(out).copy_(t);
    touched(out, true, stream, at, name);
    return out;
  }
};

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Lock lock;
  const auto& schema = op.schema();
  const auto n = schema.arguments().size();
  const auto begin = stack->size() - n;
  const std::vector<c10::IValue> arguments(stack->begin() + begin, stack->end());
  Call call{schema.operator_name().name};
  for (size_t i = 0; i < n; ++i)
    (*stack)[begin + i] = call.argument(arguments[i], schema.arguments()[i].name());
  bool masks = call.has_masks();
  call.check_on_host(arguments, masks);

  // Record the accesses and waits.
  int stream = stream_now();
  uint64_t at = launched(stream);
  for (size_t i = 0; i < n; ++i) {
    const auto* info = schema.arguments()[i].alias_info();
    bool writes = info && info->isWrite();
    auto access = [&](const Tensor& t) {
      if (is_ours(t)) touched(t, writes, stream, at, call.name);
    };
    if (arguments[i].isTensor()) access(arguments[i].toTensor());
    if (arguments[i].isTensorList())
      for (const Tensor& t : arguments[i].toTensorVector()) access(t);
    if (arguments[i].isOptionalTensorList())
      for (std::optional<Tensor> t : arguments[i].toOptionalTensorVector())
        if (t) access(*t);
  }
  bool fills = masks && !call.on_host.empty();
  if (kWaits.count(call.name) || (masks && !fills))
    host_waits_for(clocks[stream], call.name + (masks ? " with a mask" : ""));
  if (kUnordered.count(call.name))
    for (auto& [ours, cpu] : call.pairs)
      if (ours.is_floating_point()) {
        event("unordered", call.name);
        break;
      }

  {
    Quiet q;
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  call.follow_resizes();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.result(value.toTensor(), stream, at);
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(call.result(t, stream, at));
      value = list;
    }
  }
}

// Register all kernels for the device type of this process.
void register_kernels() {
  using Impl = torch::Library;
  static Impl m(Impl::IMPL, "aten", key(), __FILE__, __LINE__), all(Impl::IMPL, "_", key(), __FILE__, __LINE__);
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("view.dtype", [](const Tensor& t, c10::ScalarType dtype) {
    check_dtype(dtype);
    return at::native::view_dtype(t, dtype);
  });
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &at::native::resize_);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("record_stream", &record_stream);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  // CPU builds have loops of single operations for torch._foreach_*; on a device these are one launch for many tensors.
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames())
    if (name.name.rfind("aten::_foreach_", 0) == 0 && name.overload_name.find("out") == std::string::npos) {
      auto whole = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
      m.impl(whole.c_str(), torch::CppFunction::makeFromBoxedFunction<&kernel>());
    }
  all.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>());
}
}  // namespace pretended
