// Checks of an operator's arguments whose messages say what was given and what is allowed.
#pragma once

#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/core/exec_aten/util/scalar_type_util.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/platform/log.h>

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>

// Logs "mvlm::<op>: <message>" and returns InvalidArgument when `condition` does not hold. `op` is
// a C string; the format of the message is a string literal.
#define MVLM_REQUIRE(op, condition, format, ...)             \
  do {                                                       \
    if (!(condition)) {                                      \
      ET_LOG(Error, "mvlm::%s: " format, op, ##__VA_ARGS__); \
      return ::executorch::runtime::Error::InvalidArgument;  \
    }                                                        \
  } while (false)

namespace mvlm {

// "[1, 190, 16, 128]", for messages. Lives as long as the expression that it is made in.
class Shape {
 public:
  explicit Shape(executorch::aten::ArrayRef<executorch::aten::SizesType> sizes) {
    size_t used = Append(0, "[");
    for (size_t i = 0; i < sizes.size(); ++i) {
      char size[24];
      std::snprintf(size, sizeof(size), i == 0 ? "%" PRId64 : ", %" PRId64,
                    static_cast<int64_t>(sizes[i]));
      used = Append(used, size);
    }
    Append(used, "]");
  }
  explicit Shape(const executorch::aten::Tensor& tensor) : Shape(tensor.sizes()) {}

  const char* c_str() const { return text_; }

 private:
  size_t Append(size_t used, const char* what) {
    const int added = std::snprintf(text_ + used, sizeof(text_) - used, "%s", what);
    return std::min(sizeof(text_) - 1, used + static_cast<size_t>(added));
  }

  char text_[128];
};

// Whether the numbers lie in the default order without gaps. A dimension of size 1 may claim any
// stride: torch keeps odd ones when it permutes, and then exports them.
inline bool IsContiguous(const executorch::aten::Tensor& tensor) {
  int64_t expected = 1;
  for (ssize_t i = tensor.dim(); i-- > 0;) {
    if (tensor.size(i) != 1 && tensor.strides()[static_cast<size_t>(i)] != expected) return false;
    expected *= tensor.size(i);
  }
  return true;
}

// Checks that a tensor is float32 and lies in the default order of dimensions.
inline executorch::runtime::Error CheckFloatTensor(const char* op, const char* name,
                                                   const executorch::aten::Tensor& tensor) {
  MVLM_REQUIRE(op, tensor.scalar_type() == executorch::aten::ScalarType::Float,
               "%s is %s; it must be float32", name,
               executorch::runtime::toString(tensor.scalar_type()));
  MVLM_REQUIRE(op, IsContiguous(tensor),
               "%s of shape %s is not contiguous; give it the default dim order", name,
               Shape(tensor).c_str());
  return executorch::runtime::Error::Ok;
}

// Gives a result's tensor its shape. It must be float32 and have the room.
inline executorch::runtime::Error PrepareOut(
    const char* op, const char* name, executorch::aten::ArrayRef<executorch::aten::SizesType> sizes,
    const executorch::aten::Tensor& out) {
  MVLM_REQUIRE(op, out.scalar_type() == executorch::aten::ScalarType::Float,
               "%s is %s; it must be float32", name,
               executorch::runtime::toString(out.scalar_type()));
  MVLM_REQUIRE(op, executorch::runtime::resize_tensor(out, sizes) == executorch::runtime::Error::Ok,
               "%s has shape %s and cannot be resized to %s", name, Shape(out).c_str(),
               Shape(sizes).c_str());
  MVLM_REQUIRE(op, IsContiguous(out),
               "%s of shape %s is not contiguous; give it the default dim order", name,
               Shape(out).c_str());
  return executorch::runtime::Error::Ok;
}

}  // namespace mvlm
