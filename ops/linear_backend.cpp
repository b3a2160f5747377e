#include "linear_backend.h"

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/core/named_data_map.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "quantized_linear.h"

namespace mvlm {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::ArrayRef;
using executorch::runtime::BackendExecutionContext;
using executorch::runtime::BackendInitContext;
using executorch::runtime::BackendInterface;
using executorch::runtime::CompileSpec;
using executorch::runtime::DelegateHandle;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::NamedDataMap;
using executorch::runtime::Result;
using executorch::runtime::Span;

constexpr char kSpecKey[] = "mvlm_linear";

// What the exporter says of a linear.
struct Spec {
  int64_t in;
  int64_t out;
  int64_t group;
  std::string weight;
  std::string scales;
  std::string bias;  // "-": none
};

// The value of a compile spec; false if it is not as the exporter writes it.
bool Parse(const CompileSpec& compile_spec, Spec* spec) {
  const std::string text(static_cast<const char*>(compile_spec.value.buffer),
                         compile_spec.value.nbytes);
  char weight[128], scales[128], bias[128];
  int used = 0;
  if (std::sscanf(text.c_str(), "%" SCNd64 " %" SCNd64 " %" SCNd64 " %127s %127s %127s%n",
                  &spec->in, &spec->out, &spec->group, weight, scales, bias, &used) != 6 ||
      static_cast<size_t>(used) != text.size()) {
    return false;
  }
  spec->weight = weight;
  spec->scales = scales;
  spec->bias = bias;
  // Far beyond any model, and no product of them overflows.
  constexpr int64_t kMaxWidth = int64_t{1} << 24;
  return 0 < spec->in && spec->in <= kMaxWidth && 0 < spec->out && spec->out <= kMaxWidth &&
         spec->group >= 0;
}

// A delegate: one linear of ours, or one of XNNPACK's.
struct Handle {
  DelegateHandle* xnnpack = nullptr;  // null for a linear
  QuantizedLinear linear = {};
  FreeableBuffer weight;
  FreeableBuffer scales;
  FreeableBuffer bias;
};

// The bytes of a key, which must be exactly `size`.
Error Find(const NamedDataMap& data, const std::string& key, int64_t size, FreeableBuffer* found) {
  Result<FreeableBuffer> buffer = data.get_data(key);
  if (!buffer.ok()) {
    ET_LOG(Error, "mvlm linear: the program lacks weights %s", key.c_str());
    return buffer.error();
  }
  if (static_cast<int64_t>(buffer->size()) != size) {
    ET_LOG(Error, "mvlm linear: weights %s are %zu bytes, but %" PRId64 " were described",
           key.c_str(), buffer->size(), size);
    return Error::InvalidProgram;
  }
  found->~FreeableBuffer();
  new (found) FreeableBuffer(std::move(*buffer));
  return Error::Ok;
}

Error FindWeights(const NamedDataMap& data, const Spec& spec, Handle* handle) {
  const bool is_4_bit = spec.group > 0;
  const int64_t count = spec.in * spec.out;
  const int64_t scales_bytes = is_4_bit ? count / spec.group * 2 : spec.out * 4;
  ET_CHECK_OK_OR_RETURN_ERROR(
      Find(data, spec.weight, is_4_bit ? count / 2 : count, &handle->weight));
  ET_CHECK_OK_OR_RETURN_ERROR(Find(data, spec.scales, scales_bytes, &handle->scales));
  if (spec.bias != "-") {
    ET_CHECK_OK_OR_RETURN_ERROR(Find(data, spec.bias, spec.out * 4, &handle->bias));
  }
  QuantizedLinear& linear = handle->linear;
  linear.weight = handle->weight.data();
  linear.scales = handle->scales.data();
  linear.bias = spec.bias == "-" ? nullptr : static_cast<const float*>(handle->bias.data());
  linear.in = spec.in;
  linear.out = spec.out;
  linear.group = spec.group;
  return Error::Ok;
}

class LinearBackend final : public BackendInterface {
 public:
  bool is_available() const override { return Xnnpack() != nullptr && Xnnpack()->is_available(); }

  Result<DelegateHandle*> init(BackendInitContext& context, FreeableBuffer* processed,
                               ArrayRef<CompileSpec> compile_specs) const override {
    Handle* handle = context.get_runtime_allocator()->allocateInstance<Handle>();
    if (handle == nullptr) {
      return Error::MemoryAllocationFailed;
    }
    new (handle) Handle;
    Spec spec;
    for (const CompileSpec& compile_spec : compile_specs) {
      if (std::strcmp(compile_spec.key, kSpecKey) == 0 && Parse(compile_spec, &spec) &&
          IsSupported(spec) && context.get_named_data_map() != nullptr) {
        const Error error = FindWeights(*context.get_named_data_map(), spec, handle);
        if (error != Error::Ok) {
          handle->~Handle();
          return error;
        }
        processed->Free();
        return handle;
      }
    }
    Result<DelegateHandle*> xnnpack = Xnnpack()->init(context, processed, compile_specs);
    if (!xnnpack.ok()) {
      handle->~Handle();
      return xnnpack.error();
    }
    handle->xnnpack = *xnnpack;
    return handle;
  }

  Error execute(BackendExecutionContext& context, DelegateHandle* delegate,
                Span<EValue*> args) const override {
    Handle& handle = *static_cast<Handle*>(delegate);
    return handle.xnnpack != nullptr ? Xnnpack()->execute(context, handle.xnnpack, args)
                                     : Run(context, handle.linear, args);
  }

  void destroy(DelegateHandle* delegate) const override {
    Handle* handle = static_cast<Handle*>(delegate);
    if (handle == nullptr) {
      return;
    }
    if (handle->xnnpack != nullptr) {
      Xnnpack()->destroy(handle->xnnpack);
    }
    handle->~Handle();
  }

 private:
  static BackendInterface* Xnnpack() {
    static BackendInterface* const xnnpack =
        executorch::runtime::get_backend_class(kXnnpackBackendId);
    return xnnpack;
  }

  // What QuantizedLinear allows.
  static bool IsSupported(const Spec& spec) {
    if (spec.group == 0) {
      return spec.in <= 65536;
    }
    return spec.in % spec.group == 0 &&
           (spec.group == 32 || spec.group == 64 || spec.group == 128 || spec.group == 256);
  }

  static Error Run(BackendExecutionContext& context, const QuantizedLinear& linear,
                   Span<EValue*> args) {
    if (args.size() != 2 || !args[0]->isTensor() || !args[1]->isTensor()) {
      ET_LOG(Error, "mvlm linear: %zu arguments; an input and an output tensor are expected",
             args.size());
      return Error::InvalidArgument;
    }
    const Tensor& input = args[0]->toTensor();
    Tensor& output = args[1]->toTensor();
    const ssize_t dim = input.dim();
    constexpr ssize_t kMaxDim = 16;  // ExecuTorch's own limit
    if (input.scalar_type() != ScalarType::Float || output.scalar_type() != ScalarType::Float ||
        dim < 1 || dim > kMaxDim || input.size(dim - 1) != linear.in) {
      ET_LOG(Error, "mvlm linear: the input must be float32 [..., %" PRId64 "]", linear.in);
      return Error::InvalidArgument;
    }
    SizesType sizes[kMaxDim];
    for (ssize_t i = 0; i < dim; ++i) {
      sizes[i] = input.size(i);
    }
    sizes[dim - 1] = static_cast<SizesType>(linear.out);
    ET_CHECK_OK_OR_RETURN_ERROR(executorch::runtime::resize_tensor(
        output, ArrayRef<SizesType>(sizes, static_cast<size_t>(dim))));

    const int64_t rows = input.numel() / linear.in;
    const int64_t threads = executorch::extension::get_thread_count();
    const size_t scratch_bytes = LinearScratchBytes(linear, rows, threads);
    void* const scratch = context.allocate(scratch_bytes, kLinearScratchAlignment);
    if (scratch == nullptr) {
      ET_LOG(Error, "mvlm linear: no %zu bytes of temporary memory", scratch_bytes);
      return Error::MemoryAllocationFailed;
    }
    bool ran = true;
    RunQuantizedLinear(linear, input.const_data_ptr<float>(), rows,
                       output.mutable_data_ptr<float>(), threads, scratch,
                       [&ran](int64_t count, const auto& body) {
                         ran = executorch::extension::parallel_for(0, count, 1, body) && ran;
                       });
    return ran ? Error::Ok : Error::Internal;
  }
};

LinearBackend& TheBackend() {
  static LinearBackend backend;
  return backend;
}

[[maybe_unused]] const Error kRegistered =
    executorch::runtime::register_backend({kLinearBackendId, &TheBackend()});

}  // namespace

bool LinearBackendPays() { return LinearIsFasterHere(); }

}  // namespace mvlm
