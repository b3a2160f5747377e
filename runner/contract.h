// The names in a .pte that the runner relies on. The Python side of the same contract is
// export/contract.py; what every name means is in the README and in metadata.h.
//
// A language model alone has no method vision_encoder and none of the constant methods
// mvlm_image_*, marker and prefix included: nothing in its prompt stands for a picture, and
// "<image>" in a question is text like any other. All other models have all of them; a file with
// only some is broken.

#pragma once

#include <cstdint>

namespace mvlm::contract {

// The layout of names and values that this runner understands, and no other. A .pte says its own
// in `mvlm_format_version`. (1 had other operators, and took a prompt of any length in one call;
// 2 had no template for the second turn of a conversation, 3 gave logits of one position alone.)
inline constexpr int64_t kFormatVersion = 4;

// Methods. kVisionEncoder only of a model that takes pictures.
inline constexpr char kVisionEncoder[] = "vision_encoder";
inline constexpr char kTokenEmbedding[] = "token_embedding";
// Gives the logits [1, m, vocab] of the last m = min(n, mvlm_logit_positions) positions of a call
// with n.
inline constexpr char kTextDecoder[] = "text_decoder";

// Constant methods that ExecuTorch's own LLM runner reads too.
inline constexpr char kMaxSeqLen[] = "get_max_seq_len";
inline constexpr char kMaxContextLen[] = "get_max_context_len";
inline constexpr char kBosId[] = "get_bos_id";
inline constexpr char kEosIds[] = "get_eos_ids";
inline constexpr char kVocabSize[] = "get_vocab_size";
inline constexpr char kUseKvCache[] = "use_kv_cache";
inline constexpr char kUseSdpaWithKvCache[] = "use_sdpa_with_kv_cache";
inline constexpr char kEnableDynamicShape[] = "enable_dynamic_shape";

// Constant methods of mvlm's own.
inline constexpr char kFormat[] = "mvlm_format_version";
inline constexpr char kVersion[] = "mvlm_version";
inline constexpr char kProgramId[] = "mvlm_program_id";
inline constexpr char kModelName[] = "mvlm_model_name";
inline constexpr char kCheckpointId[] = "mvlm_checkpoint_id";
inline constexpr char kRecipe[] = "mvlm_recipe";
inline constexpr char kPromptTemplate[] = "mvlm_prompt_template";
inline constexpr char kNextTurnTemplate[] = "mvlm_next_turn_template";
inline constexpr char kLogitPositions[] = "mvlm_logit_positions";
inline constexpr char kStopStrings[] = "mvlm_stop_strings";
inline constexpr char kImageMarker[] = "mvlm_image_marker";
inline constexpr char kImagePrefix[] = "mvlm_image_prefix";
inline constexpr char kImageSize[] = "mvlm_image_size";
inline constexpr char kImageMean[] = "mvlm_image_mean";
inline constexpr char kImageStd[] = "mvlm_image_std";
inline constexpr char kImagePadColor[] = "mvlm_image_pad_color";
inline constexpr char kImageTokens[] = "mvlm_image_tokens";
inline constexpr char kTokenizer[] = "mvlm_tokenizer";

// Where the user's question goes in the templates.
inline constexpr char kPromptPlaceholder[] = "{prompt}";

}  // namespace mvlm::contract
