// Asks a .pte about a picture: ask MODEL.pte PICTURE QUESTION...
// Every further question goes on with the same conversation. Ctrl-C ends an answer.

#include <mvlm/runner.h>

#include <csignal>
#include <cstdio>

namespace {

mvlm::Runner* g_runner = nullptr;  // for the signal handler

int Fail(const mvlm::Error& error) {
  std::fprintf(stderr, "ask: %s\n", error.message.c_str());
  return error.kind == mvlm::ErrorKind::kInvalidInput ? 2 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    return Fail(mvlm::InvalidInput("usage: ask MODEL.pte PICTURE QUESTION..."));
  }
  auto loaded = mvlm::Runner::Load(argv[1]);
  if (!loaded.ok()) return Fail(loaded.error());
  mvlm::Runner& runner = **loaded;
  g_runner = &runner;
  std::signal(SIGINT, [](int) { g_runner->Stop(); });

  if (auto status = runner.AddPicture(argv[2]); !status.ok()) return Fail(status.error());
  mvlm::GenerateOptions options;
  options.temperature = 0;
  for (int i = 3; i < argc; ++i) {
    if (auto status = runner.AddText(argv[i]); !status.ok()) return Fail(status.error());
    const auto answer = runner.Generate(options, [](std::string_view text) {
      std::printf("%.*s", static_cast<int>(text.size()), text.data());
      return std::fflush(stdout) == 0;
    });
    if (!answer.ok()) return Fail(answer.error());
    std::printf("\n");
  }
  return 0;
}
