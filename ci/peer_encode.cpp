// Times how long llama.cpp takes to encode a picture, several times in one process: its own
// llama-mtmd-cli encodes once, and cold. ci/peer_llama_cpp.sh builds this against its libraries.
//
// Prints a line "encode N: MS ms" per repetition, which mvlm.runtime.bench understands.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "ggml.h"
#include "llama.h"
#include "mtmd-helper.h"
#include "mtmd.h"

namespace {

using Clock = std::chrono::steady_clock;
using Chunks = std::unique_ptr<mtmd_input_chunks, decltype(&mtmd_input_chunks_free)>;

void Silence(ggml_log_level /*level*/, const char* /*text*/, void* /*data*/) {}

int Fail(const char* what) {
  std::fprintf(stderr, "encbench: %s\n", what);
  return 1;
}

// Encodes all pictures of a prompt; returns the milliseconds, or -1.
double Encode(mtmd_context* context, const mtmd_input_chunks* chunks) {
  double ms = 0.0;
  for (size_t i = 0; i < mtmd_input_chunks_size(chunks); ++i) {
    const mtmd_input_chunk* chunk = mtmd_input_chunks_get(chunks, i);
    if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_TEXT) continue;
    const Clock::time_point start = Clock::now();
    if (mtmd_encode_chunk(context, chunk) != 0) return -1.0;
    ms += std::chrono::duration<double, std::milli>(Clock::now() - start).count();
  }
  return ms;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: encbench LLM.gguf MMPROJ.gguf PICTURE THREADS REPETITIONS\n");
    return 2;
  }
  llama_log_set(Silence, nullptr);
  mtmd_helper_log_set(Silence, nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (model == nullptr) return Fail("the language model cannot be loaded");
  mtmd_context_params parameters = mtmd_context_params_default();
  parameters.use_gpu = false;
  parameters.print_timings = false;
  parameters.warmup = true;
  parameters.n_threads = std::atoi(argv[4]);
  mtmd_context* context = mtmd_init_from_file(argv[2], model, parameters);
  if (context == nullptr) return Fail("the vision encoder cannot be loaded");
  const auto picture =
      mtmd_helper_bitmap_init_from_file(context, argv[3], false, mtmd_helper_init_opt_default());
  if (picture.bitmap == nullptr) return Fail("the picture cannot be read");

  const char* marker = mtmd_default_marker();
  mtmd_input_text text;
  std::memset(&text, 0, sizeof(text));
  text.text = marker;
  text.text_len = std::strlen(marker);
  text.parse_special = true;
  const mtmd_bitmap* pictures[] = {picture.bitmap};
  for (int repetition = 0; repetition < std::atoi(argv[5]); ++repetition) {
    const Chunks chunks(mtmd_input_chunks_init(), mtmd_input_chunks_free);
    if (mtmd_tokenize(context, chunks.get(), &text, pictures, 1) != 0) {
      return Fail("the prompt cannot be tokenized");
    }
    const double ms = Encode(context, chunks.get());
    if (ms < 0) return Fail("the picture cannot be encoded");
    std::printf("encode %d: %.1f ms\n", repetition, ms);
    std::fflush(stdout);
  }
  mtmd_free(context);
  llama_model_free(model);
  return 0;
}
