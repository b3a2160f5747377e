// llava_main: asks a .pte a question about a picture. This file only turns flags into Options.

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "runner/answer.h"
#include "runner/console.h"
#include "runner/contract.h"
#include "runner/interrupt.h"
#include "runner/stats.h"
#include "runner/str_cat.h"

namespace {

constexpr int kBadUsage = 2;

constexpr char kExamples[] = R"(Examples:
  llava_main --model_path mobilevlm.pte --image_path cat.jpg --prompt "What is in the image?"
  llava_main --model_path mobilevlm.pte --image_path cat.jpg --prompt "What color is the cat?" \
      --temperature 0 --max_new_tokens 32 --quiet > answer.txt
  llava_main --model_path mobilevlm.pte --prompt "Tell me a story." \
      --temperature 0.7 --top_p 0.9 --seed 1 --cpu_threads 4 --stats_path stats.json
  llava_main --model_path mobilevlm.pte --image_path a.jpg --image_path b.jpg \
      --prompt "Is the cat in <image> the one in <image>?"
  llava_main --model_path mobilevlm.pte --image_path cat.jpg --interactive
  llava_main --model_path mobilevlm.pte --prepare

The weight cache: the first run lays the weights out for this processor, which takes seconds, and
keeps them in files as large as the weights; later runs start at once, and with less memory. A file
is made anew whenever .pte, processor or library are others, and can be removed at any time.

The answer goes to stdout, everything else to stderr. Exit code: 0 for an answer, 2 if the flags
or files are at fault, 1 for a failure, 130 if stopped with Ctrl-C.
A .pte is made with: python -m mvlm.export --pte-name mobilevlm.pte)";

std::string VersionText() {
  return mvlm::StrCat("llava_main ", mvlm::MvlmVersion(), " (ExecuTorch ",
                      mvlm::ExecuTorchVersion(), ", .pte format ", mvlm::contract::kFormatVersion,
                      ")");
}

// What a flag takes before it is an Options field.
struct RawFlags {
  std::string workspace_sharing;
  std::string linear_kernels = "auto";
};

// CLI11 would wrap a negative seed around and cut a too large one.
std::string CheckSeed(const std::string& seed) {
  errno = 0;
  char* end = nullptr;
  std::strtoull(seed.c_str(), &end, 10);
  const bool good = errno == 0 && end != seed.c_str() && *end == '\0' && seed[0] != '-';
  return good ? "" : seed + " is not a whole number from 0 to 2^64 - 1";
}

mvlm::WorkspaceSharing ToWorkspaceSharing(const std::string& name) {
  using mvlm::WorkspaceSharing;
  return name == "off"     ? WorkspaceSharing::kOff
         : name == "model" ? WorkspaceSharing::kModel
                           : WorkspaceSharing::kGlobal;
}

mvlm::LinearKernels ToLinearKernels(const std::string& name) {
  using mvlm::LinearKernels;
  return name == "xnnpack" ? LinearKernels::kXnnpack
         : name == "mvlm"  ? LinearKernels::kMvlm
                           : LinearKernels::kAuto;
}

void AddFlags(CLI::App& app, mvlm::Options& options, RawFlags& raw) {
  app.add_option("--model_path", options.model_path, "The .pte, made with python -m mvlm.export")
      ->required()
      ->type_name("FILE");
  app.add_option("--prompt", options.prompt,
                 "The question, e.g. \"What is in the image?\". The picture goes before it, or "
                 "where it says <image>. Required, but for --interactive and --prepare")
      ->type_name("TEXT");
  app.add_option(
         "--image_path", options.image_paths,
         "A JPEG or PNG picture; without one the model only reads the prompt. Once for each "
         "of several, in the order of the <image>s. A .pte without a vision encoder takes "
         "none")
      ->allow_extra_args(false)
      ->type_name("FILE");
  app.add_flag("--interactive", options.interactive,
               "Go on asking: every line of stdin is a question, or a command like /image FILE; "
               "/help lists them");
  app.add_flag("--raw_prompt", options.raw_prompt,
               "Take the prompt as it is: do not put it into the .pte's prompt template");
  app.add_option("--tokenizer_path", options.tokenizer_path,
                 "A SentencePiece tokenizer.model to use instead of the one in the .pte")
      ->type_name("FILE");
  app.add_option("--seq_len", options.seq_len,
                 "Positions for prompt, picture and answer together [all that the .pte has]")
      ->type_name("N");
  app.add_option("--max_new_tokens", options.max_new_tokens,
                 mvlm::StrCat("Stop after this many tokens [", mvlm::kDefaultMaxNewTokens,
                              ", or what fits]"))
      ->type_name("N");
  app.add_option("--temperature", options.temperature,
                 "0 always takes the likeliest token; the higher, the more varied [0.2]")
      ->type_name("T");
  app.add_option("--top_p", options.top_p,
                 "Draw only from the likeliest tokens that together have this probability, above 0 "
                 "and up to 1 [1, all]")
      ->type_name("P");
  app.add_option("--top_k", options.top_k, "Draw only from the K likeliest tokens [0, all]")
      ->type_name("K");
  app.add_option("--seed", options.seed,
                 "The same seed gives the same answer [random; said on stderr]")
      ->check(CLI::Validator(CheckSeed, ""))
      ->type_name("N");
  app.add_option("--cpu_threads", options.cpu_threads,
                 "Threads to compute with [as many as there are fast cores]")
      ->type_name("N");
  app.add_option("--workspace_sharing", raw.workspace_sharing,
                 "How the parts of the model share scratch memory: off, model (within one method) "
                 "or global (all) [global; model with --low_memory]")
      ->check(CLI::IsMember({"off", "model", "global"}).description(""))
      ->type_name("MODE");
  app.add_option("--linear_kernels", raw.linear_kernels,
                 "Whose kernels multiply with the quantized weights: xnnpack, mvlm, or auto, which "
                 "takes ours where they are faster, on x86 CPUs without VNNI [auto]")
      ->check(CLI::IsMember({"auto", "xnnpack", "mvlm"}).description(""))
      ->type_name("WHOSE");
  app.add_option("--weight_cache", options.weight_cache,
                 "Where to keep weights laid out for this processor: auto ($XDG_CACHE_HOME/mvlm or "
                 "~/.cache/mvlm), off, or a folder, which is made if need be [auto]")
      ->type_name("auto|off|FOLDER");
  app.add_flag("--prepare", options.prepare,
               "Only fill the weight cache, so that the first answer starts at once too");
  app.add_flag("--low_memory", options.low_memory,
               "Load the language model only when the picture is encoded and the vision encoder "
               "has left memory");
  app.add_flag("--ignore_eos", options.ignore_eos,
               "Go on after end tokens and stop strings, until --max_new_tokens: for benchmarks");
  app.add_option("--stats_path", options.stats_path, "Write times, memory and versions as JSON")
      ->type_name("FILE");
  app.add_option("--etdump", options.etdump_path,
                 "Write what ran inside the model and for how long, as an ETDump for "
                 "executorch.devtools.Inspector; slower")
      ->type_name("FILE");
  app.add_flag("--quiet", options.quiet, "Say nothing on stderr but errors");
}

int Main(int argc, char** argv) {
  CLI::App app("Asks a vision-language model in a .pte file a question about a picture.",
               "llava_main");
  mvlm::Options options;
  RawFlags raw;
  AddFlags(app, options, raw);
  app.set_help_flag("--help,-h", "Show this and exit");
  app.set_version_flag("--version", VersionText(), "Show versions and exit");
  app.footer(kExamples);
  app.get_formatter()->column_width(28);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::printf("%s", app.help().c_str());
    return 0;
  } catch (const CLI::CallForVersion&) {
    std::printf("%s\n", VersionText().c_str());
    return 0;
  } catch (const CLI::ParseError& error) {
    mvlm::ReportError(mvlm::StrCat(error.what(), "; see llava_main --help"));
    return kBadUsage;
  }
  if (!raw.workspace_sharing.empty()) {
    options.workspace_sharing = ToWorkspaceSharing(raw.workspace_sharing);
  }
  options.linear_kernels = ToLinearKernels(raw.linear_kernels);
  mvlm::HandleSignals();
  return mvlm::AnswerQuestion(options);
}

}  // namespace

int main(int argc, char** argv) {
  // The library reports errors by value; this is for what the standard library throws, such as
  // when memory runs out.
  try {
    return Main(argc, argv);
  } catch (const std::exception& error) {
    mvlm::ReportError(error.what());
    return 1;
  }
}
