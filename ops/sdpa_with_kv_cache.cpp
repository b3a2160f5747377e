// Registers mvlm::sdpa_with_kv_cache.out and mvlm::sdpa_with_int8_kv_cache.out with the ExecuTorch
// runtime: checks the arguments, then runs the kernel of attention_kernel.h. sdpa_with_kv_cache.py
// holds the operators' schemas and their meaning.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include <cinttypes>
#include <limits>
#include <optional>

#include "attention_kernel.h"
#include "attention_operator.h"
#include "kernel_checks.h"

namespace mvlm {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Result;

constexpr const char* kFloatCache = "sdpa_with_kv_cache";
constexpr const char* kInt8Cache = "sdpa_with_int8_kv_cache";

Error CheckCache(const char* op, const char* name, const Tensor& cache) {
  MVLM_REQUIRE(op, cache.dim() == 4 && cache.size(0) == 1,
               "%s has shape %s; it must be [1, kv_heads, capacity, head_dim]", name,
               Shape(cache).c_str());
  MVLM_REQUIRE(op, executorch::runtime::tensor_is_contiguous(cache),
               "%s of shape %s is not contiguous; give it the default dim order", name,
               Shape(cache).c_str());
  return Error::Ok;
}

// Checks one of the tables of rotary embedding.
Error CheckTable(const char* op, const char* name, const Tensor& table, const Tensor& key_cache) {
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(op, name, table));
  const int64_t capacity = key_cache.size(2);
  const int64_t half = key_cache.size(3) / 2;
  MVLM_REQUIRE(op, table.dim() == 2 && table.size(0) >= capacity && table.size(1) == half,
               "%s has shape %s; with key_cache %s it must be [%" PRId64 " or more, %" PRId64 "]",
               name, Shape(table).c_str(), Shape(key_cache).c_str(), capacity, half);
  return Error::Ok;
}

// Checks one of the scales of an int8 cache.
Error CheckScales(const char* name, const Tensor& scales, const Tensor& key_cache) {
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(kInt8Cache, name, scales));
  MVLM_REQUIRE(kInt8Cache,
               scales.dim() == 3 && scales.size(0) == 1 && scales.size(1) == key_cache.size(1) &&
                   scales.size(2) == key_cache.size(2),
               "%s has shape %s; with key_cache %s it must be [1, %" PRId64 ", %" PRId64 "]", name,
               Shape(scales).c_str(), Shape(key_cache).c_str(),
               static_cast<int64_t>(key_cache.size(1)), static_cast<int64_t>(key_cache.size(2)));
  return Error::Ok;
}

// Checks everything but the types and scales of the caches, and describes the call. Touches no
// tensor's contents but start_pos.
Result<AttentionCall> Check(const char* op, const Tensor& qkv, const Tensor& key_cache,
                            const Tensor& value_cache, const Tensor& cos, const Tensor& sin,
                            const Tensor& start_pos, int64_t heads, std::optional<double> scale) {
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(op, "qkv", qkv));
  MVLM_REQUIRE(op, qkv.dim() == 3 && qkv.size(0) == 1,
               "qkv has shape %s; it must be [1, tokens, (heads + 2 * kv_heads) * head_dim]",
               Shape(qkv).c_str());
  ET_CHECK_OK_OR_RETURN_ERROR(CheckCache(op, "key_cache", key_cache));
  ET_CHECK_OK_OR_RETURN_ERROR(CheckCache(op, "value_cache", value_cache));

  AttentionCall call = {};
  call.tokens = qkv.size(1);
  call.heads = heads;
  call.kv_heads = key_cache.size(1);
  call.capacity = key_cache.size(2);
  call.head_dim = key_cache.size(3);
  MVLM_REQUIRE(op, call.kv_heads >= 1 && call.head_dim >= 2 && call.head_dim % 2 == 0,
               "key_cache has shape %s; it needs at least one head and an even head_dim of at "
               "least 2",
               Shape(key_cache).c_str());
  MVLM_REQUIRE(op, executorch::runtime::tensors_have_same_shape(key_cache, value_cache),
               "value_cache has shape %s; it must be that of key_cache, %s",
               Shape(value_cache).c_str(), Shape(key_cache).c_str());
  MVLM_REQUIRE(op, key_cache.const_data_ptr() != value_cache.const_data_ptr(),
               "key_cache and value_cache are the same memory; give each its own");
  // The upper limit keeps products from overflowing; no tensor is that wide.
  MVLM_REQUIRE(
      op, 1 <= heads && heads <= std::numeric_limits<int32_t>::max() && heads % call.kv_heads == 0,
      "%" PRId64 " query heads cannot share %" PRId64
      " key/value heads; heads must be a positive multiple of kv_heads",
      heads, call.kv_heads);
  // Divided rather than multiplied: heads may be anything here.
  const int64_t packed_heads = heads + 2 * call.kv_heads;
  MVLM_REQUIRE(op,
               call.tokens >= 1 && qkv.size(2) % call.head_dim == 0 &&
                   qkv.size(2) / call.head_dim == packed_heads,
               "qkv has shape %s; with heads %" PRId64
               " and key_cache %s it must be [1, tokens, %" PRId64 " * %" PRId64
               "], with at least one token",
               Shape(qkv).c_str(), heads, Shape(key_cache).c_str(), packed_heads, call.head_dim);
  ET_CHECK_OK_OR_RETURN_ERROR(CheckTable(op, "cos", cos, key_cache));
  ET_CHECK_OK_OR_RETURN_ERROR(CheckTable(op, "sin", sin, key_cache));

  MVLM_REQUIRE(op, start_pos.scalar_type() == ScalarType::Long, "start_pos is %s; it must be int64",
               executorch::runtime::toString(start_pos.scalar_type()));
  MVLM_REQUIRE(op, start_pos.dim() == 1 && start_pos.size(0) == 1,
               "start_pos has shape %s; it must be [1]", Shape(start_pos).c_str());
  call.start_pos = *start_pos.const_data_ptr<int64_t>();
  MVLM_REQUIRE(op, call.tokens <= call.capacity,
               "%" PRId64 " tokens do not fit a cache of %" PRId64 " positions", call.tokens,
               call.capacity);
  MVLM_REQUIRE(op, 0 <= call.start_pos && call.start_pos <= call.capacity - call.tokens,
               "start_pos is %" PRId64 "; with %" PRId64 " tokens and a cache of %" PRId64
               " positions it must be from 0 to %" PRId64,
               call.start_pos, call.tokens, call.capacity, call.capacity - call.tokens);
  ET_CHECK_OK_OR_RETURN_ERROR(SetScale(op, scale, call));

  call.qkv = qkv.const_data_ptr<float>();
  call.key_cache = key_cache.mutable_data_ptr();
  call.value_cache = value_cache.mutable_data_ptr();
  call.cos = cos.const_data_ptr<float>();
  call.sin = sin.const_data_ptr<float>();
  return call;
}

Error RunWithFloatCache(KernelRuntimeContext& context, const Tensor& qkv, const Tensor& key_cache,
                        const Tensor& value_cache, const Tensor& cos, const Tensor& sin,
                        const Tensor& start_pos, int64_t heads, std::optional<double> scale,
                        Tensor& out) {
  const ScalarType type = key_cache.scalar_type();
  MVLM_REQUIRE(kFloatCache, type == ScalarType::Float || type == ScalarType::Half,
               "key_cache is %s; it must be float32 or float16",
               executorch::runtime::toString(type));
  MVLM_REQUIRE(kFloatCache, value_cache.scalar_type() == type,
               "value_cache is %s; it must be %s as key_cache is",
               executorch::runtime::toString(value_cache.scalar_type()),
               executorch::runtime::toString(type));
  Result<AttentionCall> call =
      Check(kFloatCache, qkv, key_cache, value_cache, cos, sin, start_pos, heads, scale);
  if (!call.ok()) return call.error();
  call->key_values =
      type == ScalarType::Float ? KeyValues::kFloat32Cache : KeyValues::kFloat16Cache;
  return RunOperator(kFloatCache, context, *call, out);
}

Error RunWithInt8Cache(KernelRuntimeContext& context, const Tensor& qkv, const Tensor& key_cache,
                       const Tensor& key_scales, const Tensor& value_cache,
                       const Tensor& value_scales, const Tensor& cos, const Tensor& sin,
                       const Tensor& start_pos, int64_t heads, std::optional<double> scale,
                       Tensor& out) {
  for (const Tensor* cache : {&key_cache, &value_cache}) {
    MVLM_REQUIRE(kInt8Cache, cache->scalar_type() == ScalarType::Char, "%s is %s; it must be int8",
                 cache == &key_cache ? "key_cache" : "value_cache",
                 executorch::runtime::toString(cache->scalar_type()));
  }
  Result<AttentionCall> call =
      Check(kInt8Cache, qkv, key_cache, value_cache, cos, sin, start_pos, heads, scale);
  if (!call.ok()) return call.error();
  ET_CHECK_OK_OR_RETURN_ERROR(CheckScales("key_scales", key_scales, key_cache));
  ET_CHECK_OK_OR_RETURN_ERROR(CheckScales("value_scales", value_scales, key_cache));
  MVLM_REQUIRE(kInt8Cache, key_scales.const_data_ptr() != value_scales.const_data_ptr(),
               "key_scales and value_scales are the same memory; give each its own");
  call->key_values = KeyValues::kInt8Cache;
  call->key_scales = key_scales.mutable_data_ptr<float>();
  call->value_scales = value_scales.mutable_data_ptr<float>();
  return RunOperator(kInt8Cache, context, *call, out);
}

Tensor& SdpaWithKvCacheOut(KernelRuntimeContext& context, const Tensor& qkv,
                           const Tensor& key_cache, const Tensor& value_cache, const Tensor& cos,
                           const Tensor& sin, const Tensor& start_pos, int64_t heads,
                           std::optional<double> scale, Tensor& out) {
  const Error error = RunWithFloatCache(context, qkv, key_cache, value_cache, cos, sin, start_pos,
                                        heads, scale, out);
  if (error != Error::Ok) context.fail(error);
  return out;
}

Tensor& SdpaWithInt8KvCacheOut(KernelRuntimeContext& context, const Tensor& qkv,
                               const Tensor& key_cache, const Tensor& key_scales,
                               const Tensor& value_cache, const Tensor& value_scales,
                               const Tensor& cos, const Tensor& sin, const Tensor& start_pos,
                               int64_t heads, std::optional<double> scale, Tensor& out) {
  const Error error = RunWithInt8Cache(context, qkv, key_cache, key_scales, value_cache,
                                       value_scales, cos, sin, start_pos, heads, scale, out);
  if (error != Error::Ok) context.fail(error);
  return out;
}

EXECUTORCH_LIBRARY(mvlm, "sdpa_with_kv_cache.out", SdpaWithKvCacheOut);
EXECUTORCH_LIBRARY(mvlm, "sdpa_with_int8_kv_cache.out", SdpaWithInt8KvCacheOut);

}  // namespace
}  // namespace mvlm
