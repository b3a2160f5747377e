// What a line that somebody types in a conversation asks for. Pure.

#pragma once

#include <string>
#include <string_view>

#include "mvlm/result.h"

namespace mvlm {

struct ChatLine {
  enum class Kind {
    kNothing,   // an empty line
    kQuestion,  // `text`
    kImage,     // /image: a picture, in the file `text`, for the next question
    kReset,     // /reset: a new conversation
    kStats,     // /stats
    kHelp,      // /help
    kQuit,      // /quit
  };

  Kind kind = Kind::kNothing;
  std::string text;
};

// A line without its line end. A question that begins with a slash is written with two. A path may
// stand in quotation marks, as terminals put it there when a file is dropped on them.
//
// InvalidInput for an unknown command, or one that lacks its argument or has one too many.
Result<ChatLine> ParseChatLine(std::string_view line);

// The commands, for people; lines.
std::string_view ChatHelp();

}  // namespace mvlm
