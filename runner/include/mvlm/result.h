// How the runner library reports errors: by value, never by exception and never by exit().
//
// A message is written for the person who typed the command: what was given, what is allowed, what
// to do.

#pragma once

#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace mvlm {

enum class ErrorKind {
  // The caller's flags or files are at fault; trying again with the same ones cannot help. Exit 2.
  kInvalidInput,
  // Good input, but something went wrong while working on it. Exit 1.
  kFailure,
};

struct Error {
  ErrorKind kind;
  std::string message;
};

inline Error InvalidInput(std::string message) {
  return {ErrorKind::kInvalidInput, std::move(message)};
}

inline Error Failure(std::string message) { return {ErrorKind::kFailure, std::move(message)}; }

// The outcome of something that yields no value.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Error error) : error_(std::move(error)) {}  // NOLINT(google-explicit-constructor)

  bool ok() const { return !error_.has_value(); }
  // Only valid if !ok().
  const Error& error() const { return *error_; }

 private:
  std::optional<Error> error_;
};

// A value, or the error that took its place.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}      // NOLINT(google-explicit-constructor)
  Result(Error error) : state_(std::move(error)) {}  // NOLINT(google-explicit-constructor)

  bool ok() const { return std::holds_alternative<T>(state_); }
  // Only valid if !ok().
  const Error& error() const { return std::get<Error>(state_); }

  // Only valid if ok().
  T& operator*() { return std::get<T>(state_); }
  const T& operator*() const { return std::get<T>(state_); }
  T* operator->() { return &std::get<T>(state_); }
  const T* operator->() const { return &std::get<T>(state_); }

 private:
  std::variant<T, Error> state_;
};

}  // namespace mvlm
