// Shows single stages of the runner to tests in Python, which have the oracles.
//
//   mvlm_stage_dump pixels IMAGE OUT < format.json   float32 [3, size, size]; the format is
//                                                    {"size", "pad_color", "mean", "std"}
//   mvlm_stage_dump rgb IMAGE OUT                    uint8 [height, width, 3]
//   mvlm_stage_dump encode TOKENIZER                 JSON from stdin to stdout: list of texts
//                                                    -> list of lists of ids
//   mvlm_stage_dump decode TOKENIZER                 list of lists of ids -> for each, the list of
//                                                    parts in which the text came
//
// Exit code: 0, or 2 with the library's message on stderr.

#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "runner/image.h"
#include "runner/preprocess.h"
#include "runner/tokenizer.h"

namespace {

using nlohmann::json;

[[noreturn]] void Fail(const std::string& message) {
  std::cerr << message << "\n";
  std::exit(2);
}

template <typename T>
T OrFail(mvlm::Result<T> result) {
  if (!result.ok()) {
    Fail(result.error().message);
  }
  return std::move(*result);
}

template <typename T>
void WriteRaw(const std::string& path, const std::vector<T>& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(T)));
  if (!file.flush()) {
    Fail("cannot write " + path);
  }
}

mvlm::ImageFormat ReadFormat() {
  const json input = json::parse(std::cin);
  mvlm::ImageFormat format;
  format.size = input.at("size");
  format.pad_color = input.at("pad_color");
  format.mean = input.at("mean");
  format.std = input.at("std");
  return format;
}

json Encode(const mvlm::Tokenizer& tokenizer, const json& texts) {
  json all = json::array();
  for (const json& text : texts) {
    all.push_back(OrFail(tokenizer.Encode(text.get<std::string>())));
  }
  return all;
}

json Decode(const mvlm::Tokenizer& tokenizer, const json& sequences) {
  json all = json::array();
  for (const json& ids : sequences) {
    mvlm::Detokenizer detokenizer(tokenizer);
    json parts = json::array();
    for (const int64_t id : ids.get<std::vector<int64_t>>()) {
      parts.push_back(OrFail(detokenizer.Push(id)));
    }
    parts.push_back(OrFail(detokenizer.Finish()));
    all.push_back(parts);
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  if (args.size() == 3 && args[0] == "pixels") {
    WriteRaw(args[2], mvlm::Preprocess(OrFail(mvlm::LoadImage(args[1])), ReadFormat()));
  } else if (args.size() == 3 && args[0] == "rgb") {
    WriteRaw(args[2], OrFail(mvlm::LoadImage(args[1])).rgb);
  } else if (args.size() == 2 && args[0] == "encode") {
    const mvlm::Tokenizer tokenizer = OrFail(mvlm::Tokenizer::FromFile(args[1]));
    // dump() throws where text is not UTF-8, which is a failure of the test.
    std::cout << Encode(tokenizer, json::parse(std::cin)).dump();
  } else if (args.size() == 2 && args[0] == "decode") {
    const mvlm::Tokenizer tokenizer = OrFail(mvlm::Tokenizer::FromFile(args[1]));
    std::cout << Decode(tokenizer, json::parse(std::cin)).dump();
  } else {
    Fail("usage: see the top of tests/runner/stage_dump.cpp");
  }
}
