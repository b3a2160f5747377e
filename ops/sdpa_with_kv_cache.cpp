// Registers mvlm::sdpa_with_kv_cache.out with the ExecuTorch runtime: checks the arguments, then
// runs the kernel of cached_attention.h on ExecuTorch's thread pool. sdpa_with_kv_cache.py holds
// the operator's schema and its meaning.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/core/exec_aten/util/scalar_type_util.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <optional>

#include "cached_attention.h"

namespace mvlm {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Result;

// "[1, 190, 16, 128]", for messages.
class Shape {
 public:
  explicit Shape(const Tensor& tensor) {
    size_t used = Append(0, "[");
    for (ssize_t i = 0; i < tensor.dim(); ++i) {
      char size[24];
      std::snprintf(size, sizeof(size), i == 0 ? "%" PRId64 : ", %" PRId64,
                    static_cast<int64_t>(tensor.size(i)));
      used = Append(used, size);
    }
    Append(used, "]");
  }
  const char* c_str() const { return text_; }

 private:
  size_t Append(size_t used, const char* what) {
    const int added = std::snprintf(text_ + used, sizeof(text_) - used, "%s", what);
    return std::min(sizeof(text_) - 1, used + static_cast<size_t>(added));
  }

  char text_[128];
};

// Logs and returns InvalidArgument when `condition` does not hold. The message says what was given
// and what is allowed.
#define MVLM_REQUIRE(condition, ...)                           \
  do {                                                         \
    if (!(condition)) {                                        \
      ET_LOG(Error, "mvlm::sdpa_with_kv_cache: " __VA_ARGS__); \
      return Error::InvalidArgument;                           \
    }                                                          \
  } while (false)

Error CheckFloatTensor(const char* name, const Tensor& tensor, const char* layout) {
  MVLM_REQUIRE(tensor.scalar_type() == ScalarType::Float, "%s is %s; it must be float32", name,
               executorch::runtime::toString(tensor.scalar_type()));
  MVLM_REQUIRE(tensor.dim() == 4, "%s has shape %s; it must be %s", name, Shape(tensor).c_str(),
               layout);
  MVLM_REQUIRE(tensor.size(0) == 1, "%s has shape %s; the batch size must be 1", name,
               Shape(tensor).c_str());
  MVLM_REQUIRE(executorch::runtime::tensor_is_contiguous(tensor),
               "%s of shape %s is not contiguous; give it the default dim order", name,
               Shape(tensor).c_str());
  return Error::Ok;
}

// Checks everything that can be wrong and describes the call. Touches no tensor's contents but
// start_pos.
Result<CachedAttention> Check(const Tensor& query, const Tensor& key, const Tensor& value,
                              const Tensor& key_cache, const Tensor& value_cache,
                              const Tensor& start_pos, std::optional<double> scale) {
  constexpr const char* kCacheLayout = "[1, kv_heads, capacity, head_dim]";
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor("query", query, "[1, tokens, heads, head_dim]"));
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor("key", key, "[1, tokens, kv_heads, head_dim]"));
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor("value", value, "[1, tokens, kv_heads, head_dim]"));
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor("key_cache", key_cache, kCacheLayout));
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor("value_cache", value_cache, kCacheLayout));

  CachedAttention call = {};
  call.tokens = query.size(1);
  call.heads = query.size(2);
  call.head_dim = query.size(3);
  call.kv_heads = key.size(2);
  call.capacity = key_cache.size(2);
  MVLM_REQUIRE(query.numel() > 0,
               "query has shape %s; it needs at least one token, head and component",
               Shape(query).c_str());
  MVLM_REQUIRE(key.size(1) == call.tokens && key.size(3) == call.head_dim,
               "key has shape %s; with query %s it must be [1, %" PRId64 ", kv_heads, %" PRId64 "]",
               Shape(key).c_str(), Shape(query).c_str(), call.tokens, call.head_dim);
  MVLM_REQUIRE(executorch::runtime::tensors_have_same_shape(key, value),
               "value has shape %s; it must be that of key, %s", Shape(value).c_str(),
               Shape(key).c_str());
  MVLM_REQUIRE(call.kv_heads > 0 && call.heads % call.kv_heads == 0,
               "%" PRId64 " query heads cannot share %" PRId64
               " key/value heads; heads must be a multiple of kv_heads",
               call.heads, call.kv_heads);
  MVLM_REQUIRE(key_cache.size(1) == call.kv_heads && key_cache.size(3) == call.head_dim,
               "key_cache has shape %s; with key %s it must be [1, %" PRId64 ", capacity, %" PRId64
               "]",
               Shape(key_cache).c_str(), Shape(key).c_str(), call.kv_heads, call.head_dim);
  MVLM_REQUIRE(executorch::runtime::tensors_have_same_shape(key_cache, value_cache),
               "value_cache has shape %s; it must be that of key_cache, %s",
               Shape(value_cache).c_str(), Shape(key_cache).c_str());
  MVLM_REQUIRE(key_cache.const_data_ptr() != value_cache.const_data_ptr(),
               "key_cache and value_cache are the same memory; give each its own");

  MVLM_REQUIRE(start_pos.scalar_type() == ScalarType::Long, "start_pos is %s; it must be int64",
               executorch::runtime::toString(start_pos.scalar_type()));
  MVLM_REQUIRE(start_pos.dim() == 1 && start_pos.size(0) == 1,
               "start_pos has shape %s; it must be [1]", Shape(start_pos).c_str());
  call.start_pos = *start_pos.const_data_ptr<int64_t>();
  MVLM_REQUIRE(call.tokens <= call.capacity,
               "%" PRId64 " tokens do not fit a cache of %" PRId64 " positions", call.tokens,
               call.capacity);
  MVLM_REQUIRE(0 <= call.start_pos && call.start_pos <= call.capacity - call.tokens,
               "start_pos is %" PRId64 "; with %" PRId64 " tokens and a cache of %" PRId64
               " positions it must be from 0 to %" PRId64,
               call.start_pos, call.tokens, call.capacity, call.capacity - call.tokens);

  call.scale = static_cast<float>(
      scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(call.head_dim)));
  MVLM_REQUIRE(std::isfinite(call.scale) && call.scale > 0.0f,
               "scale is %g; it must be positive and finite", static_cast<double>(call.scale));

  call.query = query.const_data_ptr<float>();
  call.key = key.const_data_ptr<float>();
  call.value = value.const_data_ptr<float>();
  call.key_cache = key_cache.mutable_data_ptr<float>();
  call.value_cache = value_cache.mutable_data_ptr<float>();
  return call;
}

Error PrepareOut(const Tensor& query, Tensor& out) {
  MVLM_REQUIRE(out.scalar_type() == ScalarType::Float, "out is %s; it must be float32",
               executorch::runtime::toString(out.scalar_type()));
  MVLM_REQUIRE(executorch::runtime::resize_tensor(out, query.sizes()) == Error::Ok,
               "out has shape %s and cannot be resized to that of query, %s", Shape(out).c_str(),
               Shape(query).c_str());
  MVLM_REQUIRE(executorch::runtime::tensor_is_contiguous(out),
               "out of shape %s is not contiguous; give it the default dim order",
               Shape(out).c_str());
  return Error::Ok;
}

Tensor& SdpaWithKvCacheOut(KernelRuntimeContext& context, const Tensor& query, const Tensor& key,
                           const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
                           const Tensor& start_pos, std::optional<double> scale, Tensor& out) {
  Result<CachedAttention> call = Check(query, key, value, key_cache, value_cache, start_pos, scale);
  if (!call.ok()) {
    context.fail(call.error());
    return out;
  }
  const Error prepared = PrepareOut(query, out);
  if (prepared != Error::Ok) {
    context.fail(prepared);
    return out;
  }
  call->out = out.mutable_data_ptr<float>();

  const int64_t workers = AttentionWorkers(*call, executorch::extension::get_thread_count());
  const size_t scratch_bytes = static_cast<size_t>(workers) * AttentionScratchBytes(*call);
  Result<void*> scratch = context.allocate_temp(scratch_bytes, kScratchAlignment);
  if (!scratch.ok()) {
    ET_LOG(Error,
           "mvlm::sdpa_with_kv_cache: no %zu bytes of temporary memory; give the method's "
           "MemoryManager a temp allocator",
           scratch_bytes);
    context.fail(scratch.error());
    return out;
  }
  bool ran = true;
  RunCachedAttention(*call, workers, *scratch, [&ran](int64_t count, const auto& body) {
    ran = executorch::extension::parallel_for(0, count, 1, body) && ran;
  });
  if (!ran) context.fail(Error::Internal);
  return out;
}

#undef MVLM_REQUIRE

EXECUTORCH_LIBRARY(mvlm, "sdpa_with_kv_cache.out", SdpaWithKvCacheOut);

}  // namespace
}  // namespace mvlm
