/* The library for apps, for C and for what calls C: JNI, Swift, Dart, Python's ctypes. What it does
 * is described in runner.h, function by function.
 *
 * Texts are UTF-8 and end with a zero byte. A function that returns an mvlm_status leaves the
 * reason of anything but MVLM_OK in mvlm_last_error(). No exception passes these functions. */

#ifndef MVLM_RUNNER_C_H_
#define MVLM_RUNNER_C_H_

#include <stddef.h>
#include <stdint.h>

#define MVLM_C_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mvlm_runner mvlm_runner;

typedef enum mvlm_status {
  MVLM_OK = 0,
  MVLM_FAILURE = 1,       /* something went wrong */
  MVLM_INVALID_INPUT = 2, /* arguments or files are at fault */
} mvlm_status;

typedef enum mvlm_stop_reason {
  MVLM_STOP_END_OF_TEXT = 0,
  MVLM_STOP_STOP_STRING = 1,
  MVLM_STOP_MAX_NEW_TOKENS = 2,
  MVLM_STOP_INTERRUPTED = 3, /* mvlm_runner_stop() */
  MVLM_STOP_NOT_WANTED = 4,  /* the callback said so */
} mvlm_stop_reason;

typedef enum mvlm_pixel_format {
  MVLM_PIXELS_RGB = 0,  /* 3 bytes a pixel */
  MVLM_PIXELS_RGBA = 1, /* 4, the last is ignored */
} mvlm_pixel_format;

/* `size` is sizeof() of the struct as the caller was compiled with it, so that later versions can
 * have more fields; the functions ..._init() set it, and the defaults. */
typedef struct mvlm_runner_options {
  size_t size;
  int64_t cpu_threads;        /* 0: as many as there are fast cores */
  int64_t seq_len;            /* 0: as many positions as the .pte has */
  const char* weight_cache;   /* "auto", "off" or a folder */
  const char* tokenizer_path; /* NULL: the tokenizer in the .pte */
  int32_t low_memory;         /* 0 or 1 */
} mvlm_runner_options;

typedef struct mvlm_generate_options {
  size_t size;
  int64_t max_new_tokens; /* 0: 512, or what fits */
  double temperature;     /* 0: always the likeliest token */
  double top_p;           /* above 0 and up to 1 */
  int64_t top_k;          /* 0: all */
  uint64_t seed;
  int32_t has_seed;   /* 0: the seed is random */
  int32_t raw_prompt; /* 1: the text is put into no template */
} mvlm_generate_options;

typedef struct mvlm_score_options {
  size_t size;
  int32_t raw_prompt; /* 1: the text is put into no template */
} mvlm_score_options;

typedef struct mvlm_stats {
  size_t size;
  double load_ms;
  int64_t images;
  double image_encode_ms;
  int64_t prompt_tokens;
  double prefill_ms;
  double first_token_ms;
  int64_t generated_tokens;
  double decode_ms;
  int64_t decode_tokens;
  int64_t positions_used;
  int64_t positions_total;
} mvlm_stats;

/* Gets a part of the answer, whole characters; returns 1 if more is wanted, else 0. */
typedef int32_t (*mvlm_text_callback)(const char* text, void* user_data);

/* Gets the logits, float32 [mvlm_runner_vocab_size()], after the prompt and the first `i` ids. They
 * hold until it returns. */
typedef void (*mvlm_logits_callback)(int64_t i, const float* logits, void* user_data);

MVLM_C_API void mvlm_runner_options_init(mvlm_runner_options* options);
MVLM_C_API void mvlm_generate_options_init(mvlm_generate_options* options);
MVLM_C_API void mvlm_score_options_init(mvlm_score_options* options);

/* `options` may be NULL. `*runner` is NULL unless this returns MVLM_OK. */
MVLM_C_API mvlm_status mvlm_runner_load(const char* model_path, const mvlm_runner_options* options,
                                        mvlm_runner** runner);
/* Of NULL, nothing. No call may be running. */
MVLM_C_API void mvlm_runner_free(mvlm_runner* runner);

MVLM_C_API mvlm_status mvlm_runner_add_picture(mvlm_runner* runner, const char* path);
MVLM_C_API mvlm_status mvlm_runner_add_picture_data(mvlm_runner* runner, const void* data,
                                                    size_t size);
MVLM_C_API mvlm_status mvlm_runner_add_picture_pixels(mvlm_runner* runner, const uint8_t* pixels,
                                                      int64_t width, int64_t height,
                                                      int64_t row_bytes, mvlm_pixel_format format);
MVLM_C_API mvlm_status mvlm_runner_add_text(mvlm_runner* runner, const char* text);

/* `options`, `on_text` and `reason` may be NULL. */
MVLM_C_API mvlm_status mvlm_runner_generate(mvlm_runner* runner,
                                            const mvlm_generate_options* options,
                                            mvlm_text_callback on_text, void* user_data,
                                            mvlm_stop_reason* reason);

/* `*count` becomes how many ids the text has; the first `capacity` of them are written to `ids`,
 * which may be NULL if `capacity` is 0. */
MVLM_C_API mvlm_status mvlm_runner_tokenize(mvlm_runner* runner, const char* text, int64_t* ids,
                                            int64_t capacity, int64_t* count);
/* Logits and probabilities of given ids after what was added, which stays; see Runner::Score().
 * `ids` may be NULL if `count` is 0, and `options`, `on_logits` (called for i = 0 .. count) and
 * `log_probabilities` [count] may be NULL. After an error, `log_probabilities` is unchanged. */
MVLM_C_API mvlm_status mvlm_runner_score(mvlm_runner* runner, const int64_t* ids, int64_t count,
                                         const mvlm_score_options* options,
                                         mvlm_logits_callback on_logits, void* user_data,
                                         double* log_probabilities);
/* From any thread. */
MVLM_C_API int64_t mvlm_runner_vocab_size(const mvlm_runner* runner);
/* From any thread. */
MVLM_C_API void mvlm_runner_stop(mvlm_runner* runner);
MVLM_C_API mvlm_status mvlm_runner_reset(mvlm_runner* runner);
/* `stats->size` must be set. From any thread. */
MVLM_C_API void mvlm_runner_get_stats(const mvlm_runner* runner, mvlm_stats* stats);

/* Of the last function that failed in this thread; holds until the next call. */
MVLM_C_API const char* mvlm_last_error(void);
MVLM_C_API const char* mvlm_version(void);

#ifdef __cplusplus
}
#endif

#endif /* MVLM_RUNNER_C_H_ */
